"""Where a run keeps things: small results and pictures in the project, by profile; what takes long in the user's cache, by id."""

from torch import Tensor

from masksae.code_ids import code_id
from masksae.errors import DataError
from masksae.files import (
    atomic_dir,
    cache_dir,
    ensure_writable,
    read_json,
    repository,
    run_id,
    save_tensors,
    write_json,
)
from masksae.profile import load_profile

WRITES = {
    "00_mechanism": ["mechanism"],
    "01_data": ["data"],
    "02_train": ["train"],
    "03_reconstruction": ["reconstruction"],
    "04_absorption": ["absorption", "contexts", "along", "along_effects", "noise"],
    "05_probing": ["probing"],
    "06_perturbation": ["perturbation"],
    "07_ood": ["ood"],
    "09_paper": ["claims"],
}
"""Results of each notebook."""


class Store:
    """One profile's folders: `results`, `figures`, `build` (all of this profile only)."""

    def __init__(self, profile="smoke"):
        self.profile, self.source = load_profile(profile), str(profile)
        root, name = repository(), self.profile.name
        self.results, self.figures, self.build = (root / kind / name for kind in ("results", "figures", "build"))
        for folder in (self.results, self.figures, self.build):
            ensure_writable(folder)

    def save_result(self, name: str, value) -> None:
        """Write results/<profile>/NAME.json."""
        write_json(self.results / f"{name}.json", value)

    def result(self, name: str):
        """Read results/<profile>/NAME.json. Raises DataError with the remedy if it is not there."""
        path = self.results / f"{name}.json"
        if not path.exists():
            notebook = next((notebook for notebook, names in WRITES.items() if name in names), "that writes it")
            raise DataError(
                f"{path} is missing. Run notebook {notebook} with profile {self.profile.name} first. From here, in a cell: "
                f"!python -m masksae.pipeline run {notebook} {self.source}. Everything: `make repro PROFILE={self.source}`."
            )
        return read_json(path)

    def scratch(self, kind: str, key, code: tuple[str, ...], make) -> dict[str, Tensor]:
        """Tensors that `make()` gives, kept in scratch under an id of `key` and of the code in `code`."""
        from safetensors.torch import load_file

        folder = cache_dir(kind, run_id([self.profile.model.model_dump(), key, code_id(*code)]))
        if not folder.exists():
            tensors = make()
            with atomic_dir(folder) as tmp:
                save_tensors(tensors, tmp / "tensors.safetensors")
        return load_file(folder / "tensors.safetensors")

    def kept(self, kind: str, key, make) -> list[dict]:
        """Rows that `make()` gives, kept in scratch under an id of `key`."""
        file = cache_dir("scores", f"{kind}-{run_id(key)}.json")
        if not file.exists():
            write_json(file, make())
        return read_json(file)
