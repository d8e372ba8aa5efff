#!/usr/bin/env bash
# Fuzzes every parser and codec: scripts/fuzz.sh SECONDS [TARGET...]      (default: every target)
#
# Each target runs for SECONDS, with what it has found before (target/fuzz/TARGET/corpus). An input that breaks a
# property is left in target/fuzz/TARGET/crash-*, and makes this fail; run it again with
#
#   FUZZ_TARGET=TARGET target/release/warren-fuzz target/fuzz/TARGET/crash-...
#
# FUZZ_RUNS=N bounds the number of inputs too, and makes the run repeatable (a fixed seed, an empty corpus).
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
seconds=${1:?usage: $0 SECONDS [TARGET...]}
shift

RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/fuzz-rustc.sh CARGO_INCREMENTAL=0 \
  cargo build --release --locked --workspace --bin warren-fuzz --features warren-fuzz/libfuzzer
program=$target/release/warren-fuzz

[ $# -gt 0 ] || mapfile -t names < <(FUZZ_TARGET=list "$program")
[ $# -eq 0 ] || names=("$@")
failed=()
for name in "${names[@]}"; do
  own=$target/fuzz/$name
  bounds=(-max_total_time="$seconds")
  if [ -n "${FUZZ_RUNS:-}" ]; then
    rm -rf "$own/corpus"
    bounds+=(-runs="$FUZZ_RUNS" -seed=1)
  fi
  rm -rf "$own/seeds"
  mkdir -p "$own/corpus" "$own/seeds"
  echo "== $name"
  if ! FUZZ_TARGET=$name FUZZ_SEEDS=$own/seeds "$program" "${bounds[@]}" -max_len=4096 -timeout=10 -rss_limit_mb=1024 \
    -print_final_stats=1 -artifact_prefix="$own/" "$own/corpus" "$own/seeds" >"$own/log" 2>&1; then
    failed+=("$name")
    tail -n 40 "$own/log"
  elif ! grep -q 'INFO: Loaded 1 modules' "$own/log"; then
    failed+=("$name")
    echo "the program is not instrumented"
  else
    grep -E '^#[0-9]+\s+DONE|stat::(number_of_executed_units|peak_rss_mb)' "$own/log"
  fi
done
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
