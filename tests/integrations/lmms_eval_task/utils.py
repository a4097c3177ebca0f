"""A task for lmms-eval that needs no hub: questions of glimpse's held-out set."""

from foveate import glimpse


def doc_to_visual(doc):
    return [glimpse.heldout(1, kinds=glimpse.KINDS[:8], first=doc["index"])[0].image]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
