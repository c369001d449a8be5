"""For mkdocs: the styles that the site shows and docs/ does not hold, and a search that works from the disk too."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the colours of code and the site's own styles."""
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "css/pygments.css", content=colours))
    files.append(File.generated(config, "css/site.css", abs_src_path=str(HERE / "site.css")))
    return files


@event_priority(-100)  # after the plugin that writes the index
def on_post_build(config: MkDocsConfig) -> None:
    """Replace the script of the search, and make a script of its index."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var search_index = {index};\n", encoding="utf-8")
    (folder / "main.js").write_text((HERE / "search.js").read_text(encoding="utf-8"), encoding="utf-8")
