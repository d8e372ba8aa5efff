# Small helpers of the tests in this folder. Sourced; the caller sets `dir`, a scratch folder.

passed=0 failed=0

# expect WHAT COMMAND...: in a shell of its own, where any failing step is the end
expect() {
  local what=$1
  shift
  ("$@") >"$dir/output" 2>&1 & # in the background: `if` would switch errexit off
  if wait $!; then
    echo "ok: $what"
    passed=$((passed + 1))
  else
    echo "FAILED: $what"
    sed 's/^/    /' "$dir/output"
    failed=$((failed + 1))
  fi
}

# soon COMMAND...: succeeds within a minute, or `patience` seconds. Each attempt is like one of `expect`.
soon() {
  local deadline=$((SECONDS + ${patience:-60}))
  while :; do
    ("$@") >"$dir/soon" 2>&1 &
    if wait $!; then return; fi
    ((SECONDS < deadline)) || { echo "not in time: $*"; cat "$dir/soon"; return 1; }
    sleep 0.2
  done
}

# result NAME: the last line, and whether all is well
result() {
  echo "$1: $passed passed, $failed failed"
  ((failed == 0))
}
