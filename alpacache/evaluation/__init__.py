"""Evaluation from cached features: paths, metrics, pictures, report; and what the features themselves hold."""
