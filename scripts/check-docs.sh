#!/usr/bin/env bash
# The pages must not fall behind the code: every reason a connection can fail for is explained, and every
# relative link leads somewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0

reasons=$(sed -nE 's/^    [A-Z][A-Za-z]*: "([a-z_]+)", [0-9]+, .*/\1/p' mesh-api/src/errors.rs)
[ -n "$reasons" ] || { echo "no reasons found in mesh-api/src/errors.rs"; failed=1; }
while read -r reason; do
  grep -q "^| \`$reason\` |" docs/operations.md || { echo "docs/operations.md does not explain the reason '$reason'"; failed=1; }
done <<<"$reasons"

while IFS=: read -r page link; do
  target=${link%%#*}
  [ -z "$target" ] || [ -e "$(dirname "$page")/$target" ] || { echo "$page links to $link, which is not there"; failed=1; }
done < <(grep -oHE '\]\([^)]+\)' README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs/*.md docs/*/*.md benches/*.md |
  sed -E 's/\]\(([^)]+)\)/\1/' | grep -vE ':https?://')

exit $failed
