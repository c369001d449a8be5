"""A trained run to look at: its model, its images, edits, and the command line that repeats each picture.

    opened = OpenRun.open("runs/fashion")
    subject = Subject(opened, opened.pick(parse_image("0")))  # held-out image 0, or a file
    edit = Edit((Add("T-shirt/top", "rest", 1.5),), keep=(0.5, 1.0, 1.0))
    made = subject.made(subject.edited(edit).pixels, edit)  # made.data is a PNG, made.command gives the same one

Read opened.py first. The folder may import every folder outside app; the command line and the page use its classes.
"""

from pyglow_fast.app.studio.directions import Add, Directions
from pyglow_fast.app.studio.edits import Between, Edit, Edited, Subject, likelihood_text
from pyglow_fast.app.studio.opened import Drawn, OpenRun, Picked, Scores
from pyglow_fast.app.studio.pictures import FileScore, Grid, Made, score_files
from pyglow_fast.app.studio.words import Draw, File, HeldOut, Sample, parse_image

__all__ = [
    "Add",
    "Between",
    "Directions",
    "Draw",
    "Drawn",
    "Edit",
    "Edited",
    "File",
    "FileScore",
    "Grid",
    "HeldOut",
    "Made",
    "OpenRun",
    "Picked",
    "Sample",
    "Scores",
    "Subject",
    "likelihood_text",
    "parse_image",
    "score_files",
]
