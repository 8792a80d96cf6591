#!/usr/bin/env bash
# Everything a GPU is needed for, in one call of under nine minutes: build, all tests with the GPU ones,
# compute-sanitizer, benchmarks, one table.
#
#   benchmarks/gpu.sh [OUTDIR]        OUTDIR: benchmarks/results/ by default
#
# Needs Python with torch (CUDA), numpy, pytest, hypothesis and pytest-benchmark, nvcc, cmake, ninja; Triton
# and the benchmark's rivals are used where they are installed. No network. Each stage has a time limit and
# leaves its log in OUTDIR; the exit status is that of the worst stage.
set -uo pipefail

cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
started=$SECONDS

if ! reason=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch cannot be imported: {error}")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
' 2>&1); then
  echo "gpu.sh: this needs a GPU, and there is none: $reason" >&2
  exit 2
fi

mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
summary="$out/summary.txt"
: >"$summary"

# stage NAME SECONDS COMMAND...: runs it within that time, the log in OUTDIR/NAME.log.
stage() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 15
  code=${PIPESTATUS[0]}
  printf '%-24s exit %-4s %4d s\n' "$name" "$code" $((SECONDS - begin)) >>"$summary"
  if ((code != 0)); then status=1; fi
  return "$code"
}

# skipped NAME REASON: a stage that cannot run here is in the summary all the same.
skipped() { printf '%-24s skipped: %s\n' "$1" "$2" | tee -a "$summary"; }

versions() {
  "$python" - <<'PYTHON'
import datetime, importlib.metadata, platform, subprocess
import torch

def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

print("date     ", datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
print("commit   ", output("git", "rev-parse", "HEAD"), output("git", "status", "--porcelain", "-uno") and "(modified)")
print("gpu      ", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
print("driver   ", output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
print("python   ", platform.python_version())
print("torch    ", torch.__version__, "CUDA", torch.version.cuda)
print("nvcc     ", output("nvcc", "--version").splitlines()[-1])
for package in ("triton", "numpy", "opencv-python-headless", "pillow", "POT", "geomloss", "flash-sinkhorn",
                "pytorch-metric-learning"):
    print(f"{package:9}", version(package))
PYTHON
}

versions | tee "$out/versions.txt"

# The architecture of this machine alone, to build in seconds.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}"
if ! stage build 150 env SKETCHFAST_BUILD=cuda "$python" setup.py build_ext --inplace; then
  echo "gpu.sh: the build failed, see $out/build.log" >&2
  exit 1
fi

stage tests 180 "$python" -m pytest tests -q --maxfail=20 --durations=5 -p no:cacheprovider

for op in raster sinkhorn triplet hyperlstm mixture; do
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      stage "$tool-$op" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "benchmarks/sanitize_$op.py"
    else
      skipped "$tool-$op" "no compute-sanitizer"
    fi
  done
done

stage step-sketchembednet 90 "$python" benchmarks/bench_train.py sketchembednet --preset paper \
  --precision bf16-mixed --impls auto reference --rounds 5 --json "$out/step_sketchembednet.json"

# Nine minutes in all: the benchmarks get what is left.
for suite in benchmarks/bench_*.py; do
  name=$(basename "$suite" .py)
  [[ $name == bench_train ]] && continue # no pytest suite
  left=$((525 - (SECONDS - started)))
  if ((left < 20)); then
    skipped "$name" "no time left"
    status=1
    continue
  fi
  stage "$name" "$left" "$python" -m pytest "$suite" -q -p no:cacheprovider --benchmark-json "$out/$name.json"
done

shopt -s nullglob
json=("$out"/bench_*.json)
if ((${#json[@]})); then
  stage table 60 "$python" benchmarks/plot.py "${json[@]}" --out "$out"
fi
echo "== summary, after $((SECONDS - started)) s"
cat "$summary"
exit $status
