"""The sizes of the splits, and the classes of the published test split."""

# Subjects by the names of their classes.
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
# The published test split: its classes by subject, and IMG for questions with an image.
PUBLISHED_CLASSES = {"NAT": 2252, "SOC": 889, "LAN": 1100, "IMG": 2017}
PUBLISHED_QUESTIONS = sum(PUBLISHED_CLASSES[label] for label in SUBJECTS.values())
MINIATURE_SIZES = {"train": 8000, "validation": 2000, "test": 4000, "claims": 20000}
