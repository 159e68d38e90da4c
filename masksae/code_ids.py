"""Ids of code: what is kept in scratch is found again only as long as the code that made it does the same."""

import ast
import importlib.util
from pathlib import Path

from masksae.files import run_id

SOURCE_CODE = ("packages", "hub", "sources", "models")
STREAM_CODE = ("corpus", "masking", "tracing", "activations")
SAE_CODE = ("saes.config", "saes.sae", "saes.rules", "saes.loss", "saes.sparse")
TRAINING_CODE = (*STREAM_CODE, *SAE_CODE, "recipe", "member", "training")


def code_id(*modules: str) -> str:
    """Id of what some modules of masksae do: comments, docstrings and layout do not count."""
    trees = {}
    for module in modules:
        tree = ast.parse(Path(importlib.util.find_spec(f"masksae.{module}").origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body.pop(0)
        trees[module] = ast.dump(tree)
    return run_id(trees)
