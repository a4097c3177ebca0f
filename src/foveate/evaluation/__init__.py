"""Asks a vision-language model questions in batches, and scores what it says."""

from foveate.evaluation.runner import Batch, answer, generate, prepare
from foveate.evaluation.scores import blind, exact_match, interval, majority, score

__all__ = ["Batch", "answer", "blind", "exact_match", "generate", "interval", "majority", "prepare", "score"]
