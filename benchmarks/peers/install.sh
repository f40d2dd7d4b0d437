#!/usr/bin/env bash
# install.sh ENV: the newest of each peer beside fastai and this package in ENV, where that leaves torch and fastai as they are; else in ENV-peer, by itself.
# A peer that can't be installed leaves pip's words in ENV/peer.log, for the tables.
set -eu
cd "$(dirname "$0")/../.."
env=$1
pip() { "$1/bin/python" -m pip "${@:2}" -q --disable-pip-version-check; }
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
pip "$env" install --upgrade fastai -e .
"$env/bin/python" -m pip list --format freeze | grep -E '^(torch|torchvision|fastai|fastcore)==' > "$env/constraints.txt"

while read -r peer dist; do
    log=$env/$peer.log
    # the newest of all, not the newest that would fit
    if pip "$env" install --upgrade --no-deps "$dist" > "$log" 2>&1; then
        version=$("$env/bin/python" -c "from importlib.metadata import version; print(version('$dist'))")
        pip "$env" install -c "$env/constraints.txt" "$dist==$version" >> "$log" 2>&1 && rm "$log" && continue
        pip "$env" uninstall -y "$dist" > /dev/null 2>&1 || true
        [ -x "$env-$peer/bin/python" ] || "${PYTHON:-python3}" -m venv "$env-$peer"
        pip "$env-$peer" install --upgrade "$dist" >> "$log" 2>&1 && rm "$log" && echo "$dist $version wants another torch or fastai: it is in $env-$peer" && continue
        rm -rf "$env-$peer"
    fi
    echo "$dist could not be installed: $(tail -n 1 "$log")"
done <<END
fastxtend fastxtend
lightning lightning
accelerate accelerate
transformers transformers
ignite pytorch-ignite
composer mosaicml
keras keras
sentence_transformers sentence-transformers
END
