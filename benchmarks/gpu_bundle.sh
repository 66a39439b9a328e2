#!/usr/bin/env bash
# Makes the wheels that a bare GPU machine lacks: one that has CPython 3.12, PyTorch for CUDA and transformers, and reaches no package
# index. Run it where there is one; which, pip's own configuration says.
#
#   benchmarks/gpu_bundle.sh FOLDER [PACKAGE…]     the named packages alone; otherwise all below (ray only when it is named)
#
# There:
#
#   python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#   export PYTHONPATH=/tmp/site:src
#   python3 -m pytest -W default -m gpu tests/gpu
#   python3 -m benchmarks.training.gpu --tokenizer MODEL_FOLDER
#
# Versions are those of constraints.txt. No package's dependencies come along: PyTorch would be among them. DeepSpeed is built by the
# `python3` on PATH, which needs PyTorch and setuptools for it. flash-attn has no wheel; where the benchmark is to have TRL with it,
# build it there.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:?usage: benchmarks/gpu_bundle.sh FOLDER [PACKAGE…]}"
shift
mkdir -p "$folder"

# What losses, models and the engine import; what runs the tests; DeepSpeed; TRL, as the benchmark's peer.
packages=(
  annotated-types pydantic pydantic_core typing_extensions typing-inspection
  boto3 botocore jmespath s3transfer python-dateutil tenacity peft
  pytest pytest-asyncio pytest-timeout pluggy iniconfig
  deepspeed einops hjson msgpack py-cpuinfo
  datasets dill fsspec multiprocess trl xxhash liger-kernel
)
liger="liger-kernel==0.8.5" # its kernels are Triton's, so it is no part of our environment, which constraints.txt describes
if (($# > 0)); then packages=("$@"); fi

# pinned NAME: NAME==VERSION as in constraints.txt; upper and lower case, `-` and `_` are one there.
pinned() {
  local pattern="${1//[-_]/[-_]}"
  if [[ "$1" == liger-kernel ]]; then echo "$liger"; return; fi
  grep -ixE "$pattern==.*" constraints.txt || { echo "$1 has no version in constraints.txt" >&2; return 1; }
}

platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

# wheel REQUIREMENT: downloads a wheel for CPython 3.12, or builds one that fits every Python.
wheel() {
  if [[ "$1" == deepspeed==* ]]; then # there is no wheel of it; without compiled operators it is plain Python
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu python3 -m pip --quiet wheel --no-deps --no-build-isolation --wheel-dir "$folder" "$1"
  else
    python3 -m pip --quiet download --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "${platforms[@]}" \
      --dest "$folder" "$1"
  fi
}

# without_jars FILE: takes ray/jars, for Java programs, out of a wheel of Ray: a third of it.
without_jars() {
  python3 - "$1" <<'PYTHON'
import os
import sys
import zipfile

path = sys.argv[1]
with zipfile.ZipFile(path) as whole, zipfile.ZipFile(f"{path}.part", "w", zipfile.ZIP_DEFLATED) as rest:
    for entry in whole.infolist():
        data = whole.read(entry)
        if entry.filename.endswith(".dist-info/RECORD"):
            data = b"".join(line for line in data.splitlines(keepends=True) if not line.startswith(b"ray/jars/"))
        if not entry.filename.startswith("ray/jars/"):
            rest.writestr(entry, data)
os.replace(f"{path}.part", path)
PYTHON
}

for package in "${packages[@]}"; do
  wheel "$(pinned "$package")"
done
for file in "$folder"/ray-*.whl; do
  if [[ -e "$file" ]]; then without_jars "$file"; fi
done
du -ch "$folder"/*.whl
