#!/usr/bin/env bash
# Make what is published, and check it: a source archive and a wheel of this commit.
#
#   tools/release.sh [FOLDER]          build and check; into dist/ by default
#   tools/release.sh upload [FOLDER]   the same, then sign with sigstore and upload with twine
#
# Needs `pip install '.[release]'`.  twine takes the index and who uploads from its own settings.
set -euo pipefail
cd "$(dirname "$0")/.."
upload=false
if [ "${1:-}" = upload ]; then upload=true; shift; fi
dist=${1:-dist}
if $upload && [ -n "$(git status --porcelain)" ]; then
  echo "The working tree has changes: commit them first, for the archives are the commit's." >&2
  exit 1
fi
mkdir -p "$dist"
if [ -n "$(ls -A "$dist")" ]; then
  echo "$dist is not empty." >&2
  exit 1
fi
# The same bytes from the same commit, whenever it is built.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
python3 -m build --outdir "$dist" .
python3 -m twine check --strict "$dist"/*
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for archive in "$dist"/*; do
  python3 -m venv --clear "$scratch/venv"
  "$scratch/venv/bin/python" -m pip install -q "$archive"
  # Not in the checkout, whose folder would be imported.
  (cd "$scratch" && venv/bin/fi-ffi --version && venv/bin/fi-ffi demo --device cpu | tail -1)
done
(cd "$dist" && sha256sum -- *)
if $upload; then
  python3 -m sigstore sign "$dist"/*
  python3 -m twine upload "$dist"/*.whl "$dist"/*.tar.gz
fi
