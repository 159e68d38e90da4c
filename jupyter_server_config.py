"""JupyterLab's settings for this project (`make lab`): notebooks are saved without outputs.

So running one by hand changes neither `git status` nor `dvc status`. Executed notebooks are in build/<profile>/.
"""

from nbstripout import strip_output

c = get_config()  # noqa: F821 (given by Jupyter)


def strip(model, **_):
    if model["type"] == "notebook" and model["content"] is not None:
        strip_output(model["content"], keep_output=False, keep_count=False, keep_id=True)


c.ContentsManager.pre_save_hook = strip
