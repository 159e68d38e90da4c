#!/bin/sh
# `make release`: an sdist, the wheel that is built from it, and that wheel in a clean environment with the pinned versions of what it needs.
set -eu
rm -rf dist build/release
mkdir -p dist build/release
python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > build/release/sdist.log
python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist dist/*.tar.gz
python -m venv build/release/venv
build/release/venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock dist/*.whl
cd build/release
venv/bin/python - << 'END'
import torch
import masksae

x = torch.randn(4096, 64)
stream = masksae.ActivationStream.from_array(x, batch_size=256, seed=0)
config = masksae.SAEConfig(64, 512, masksae.BatchTopK(8), prefixes=masksae.MATRYOSHKA)
[sae] = masksae.train([config], stream, masksae.TrainConfig(steps=100, warmup=10, threshold_start=50), progress=False)
sae.save("sae")
print(f"masksae {masksae.__version__} trains: explained variance {masksae.metrics.explained_variance(x, sae(x)):.3f}")
END
venv/bin/masksae export sae saelens --to saelens > /dev/null
venv/bin/masksae plan smoke > /dev/null
echo "$(venv/bin/python -m pip list --disable-pip-version-check 2> /dev/null | tail -n +3 | wc -l) packages, $(du -sm venv | cut -f1) MB"
ls -l ../../dist | tail -n +2
