"""The main job at CPU scale: the shipped study, then its report."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
