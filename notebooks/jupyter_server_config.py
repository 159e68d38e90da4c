"""JupyterLab's settings for this project (`make lab`): notebooks are saved without outputs.

So running one by hand changes neither `git status` nor `dvc status`. Executed notebooks are in build/<profile>/.
"""

import warnings

import nbformat
from nbstripout import strip_output

c = get_config()  # noqa: F821 (given by Jupyter)

TRACES = [
    "metadata.widgets",
    *(f"cell.metadata.{key}" for key in ("collapsed", "execution", "ExecuteTime", "scrolled")),
]
"""What a run leaves besides outputs and counts."""


def strip(model, **_):
    """Jupyter hands over what the browser sent: a dict, with all that a started kernel says of itself as `language_info`."""
    if model["type"] == "notebook" and model["content"] is not None:
        notebook = nbformat.from_dict(model["content"])
        strip_output(notebook, keep_output=False, keep_count=False, keep_id=True, extra_keys=TRACES)
        if "language_info" in notebook.metadata:
            notebook.metadata.language_info = {"name": notebook.metadata.language_info.get("name", "python")}
        model["content"] = notebook


c.ContentsManager.pre_save_hook = strip
warnings.filterwarnings("ignore", message="Overriding existing pre_save_hook")  # Jupyter sets ours twice
