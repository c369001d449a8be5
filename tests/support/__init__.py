"""What tests share: cases, checks, models of other libraries, and how the suite runs. Nothing here is a test."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the source tree
