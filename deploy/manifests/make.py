#!/usr/bin/env python3
"""Writes what `warren install` prints: the chart, rendered by Helm, with marks where the command's options go. Run it
after a change of the chart; `make charts` fails if the files differ.

    target/venv/bin/python deploy/manifests/make.py [--check]
"""

import pathlib
import re
import sys

import helm_python as helm
import yaml

HERE = pathlib.Path(__file__).resolve().parent
CHART = HERE.parent / "charts/warren"
HA = yaml.safe_load((CHART / "values-ha.yaml").read_text())
# What differs by more than a word; kind, eks and aks are the default, k3s differs in paths.
PLATFORMS = {"default": "", "gke": "gke", "openshift": "openshift"}
MARKS = {
    "image": {"registry": "__REGISTRY__", "tag": "__TAG__"},
    "logLevel": "__LOG__",
    "cni": {"confDir": "/__CONF_DIR__", "binDir": "/__BIN_DIR__"},
    "controller": {"config": {"mode": "__MODE__", "trustDomain": "__TRUST_DOMAIN__"}},
    # `warren uninstall` does what the hook does.
    "uninstall": {"hook": False},
}


def files():
    dashboards = render({}, True)
    yield "dashboards.yaml", [text for text in dashboards if "name: warren-dashboard-" in text]
    for name, platform in PLATFORMS.items():
        for suffix, values in (("", {}), ("-ha", HA)):
            yield f"{name}{suffix}.yaml", render({**values, "platform": platform}, False)


def render(values, dashboards):
    with helm.Chart.load(CHART) as chart:
        values = merged(merged(values, MARKS), {"monitoring": {"dashboards": {"enabled": dashboards}}})
        rendered = chart.render(values, name="warren", namespace="warren-system")
    documents = []
    for path, text in sorted(rendered.items()):
        if path.endswith(".txt"):
            continue
        for document in re.split(r"^---\n", text, flags=re.M):
            if re.sub(r"^\s*#.*$", "", document, flags=re.M).strip():
                documents.append(marked(document))
    return documents


def marked(document):
    document = document.replace('managed-by: "Helm"', 'managed-by: "warren"')
    name = re.search(r"^  name: (\S+)$", document, re.M)[1]
    document = re.sub(r'(config-hash: )"[0-9a-f]+"', rf'\1"__HASH_{name}__"', document)
    return document.strip("\n") + "\n"


def merged(one, other):
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def main():
    stale = []
    for name, documents in files():
        text = f"# Written by {pathlib.Path(__file__).name}.\n" + "---\n".join(["", *documents])
        file = HERE / name
        if not file.exists() or file.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                file.write_text(text)
    if "--check" in sys.argv and stale:
        sys.exit(f"not as deploy/manifests/make.py writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
