#!/usr/bin/env bash
# cargo's RUSTC_WORKSPACE_WRAPPER for scripts/fuzz.sh: instruments the workspace's own crates for libFuzzer, with the
# stable compiler. Dependencies stay as every other build left them, and are not compiled again.
set -euo pipefail
case " $* " in
  # Programs that run while building do not link libFuzzer.
  *" --crate-name build_script_"*) exec "$@" ;;
esac
exec "$@" --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1 \
  -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
