// The search of mkdocs asks a worker to read a file, which browsers refuse where a page is opened from the disk.
// Here index and lunr are scripts of the page itself, and its one question is that of the form: search.html?q=WORDS.
(function () {
  const input = document.getElementById("mkdocs-search-query");
  const shown = document.getElementById("mkdocs-search-results");
  if (!input) return;

  function load(name, then) {
    const script = document.createElement("script");
    script.src = base_url + "/search/" + name;
    script.onload = then;
    document.head.append(script);
  }

  function found(index, pages) {
    shown.replaceChildren();
    const results = input.value.trim() ? index.search(input.value) : [];
    for (const { ref } of results) {
      const link = Object.assign(document.createElement("a"), { href: base_url + "/" + ref, textContent: pages.get(ref).title });
      const title = document.createElement("h3");
      title.append(link);
      const text = document.createElement("p");
      text.textContent = pages.get(ref).text.slice(0, 200);
      shown.append(title, text);
    }
    if (!results.length) shown.textContent = shown.dataset.noResultsText;
  }

  load("lunr.js", () => load("search_index.js", () => {
    const pages = new Map(search_index.docs.map((page) => [page.location, page]));
    const index = lunr(function () {
      this.ref("location");
      this.field("title", { boost: 10 });
      this.field("text");
      search_index.docs.forEach((page) => this.add(page));
    });
    input.value = new URLSearchParams(location.search).get("q") || "";
    input.addEventListener("input", () => found(index, pages));
    found(index, pages);
  }));
})();
