#!/usr/bin/env python3
"""Checks the charts with Helm itself (its Go library), without a cluster.

    scripts/install-deps.sh charts && target/venv/bin/python deploy/charts/tests/check.py target/release/warren

The argument is the `warren` command: what `warren install` prints must be what Helm makes of the same values. For every set of values below: strict lint; every rendered document against the Kubernetes schemas of the oldest and the newest
version that is supported; and what the charts promise of privileges, names and configuration.
"""

import pathlib
import re
import subprocess
import sys

import helm_python as helm
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHARTS = ROOT / "deploy/charts"
# `kubeVersion` in Chart.yaml, and the newest.
KUBERNETES = ["1.31.0", "1.37.0"]
# Not in the Kubernetes schemas.
CUSTOM = {"PodMonitor"}
PLATFORMS = ["kind", "k3s", "gke", "eks", "aks", "openshift"]

EVERYTHING = {
    "mode": "strict",
    "trustDomain": "example.org",
    "logLevel": "info,warren_cni=debug",
    "image": {"registry": "registry.example.org/mesh", "tag": "1", "pullSecrets": [{"name": "pull"}]},
    "commonLabels": {"team": "net"},
    "commonAnnotations": {"contact": "net@example.org"},
    "controller": {
        "replicas": 2,
        "rootSecret": "my-root",
        "config": {"ca": {"leafLifetimeSeconds": 3600}},
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "extraEnv": [{"name": "E", "value": "1"}],
        "tolerations": [{"key": "k", "operator": "Exists"}],
        "podDisruptionBudget": {"maxUnavailable": "30%"},
        "affinity": {"nodeAffinity": {}},
    },
    "cni": {"confDir": "/a", "binDir": "/b", "netnsDir": "/c", "excludeNamespaces": ["x"], "maxUnavailable": "10%"},
    "nodeProxy": {
        "image": "mine:1",
        "accessLog": "json",
        "tracingEndpoint": "http://otel:4317",
        "tracingSampleRatio": 0.1,
        "config": {"limits": {"requests": 100}},
        "maxSurge": "20%",
    },
    "monitoring": {"podMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}}},
    "networkPolicy": {"enabled": True},
}
HA = yaml.safe_load((CHARTS / "warren/values-ha.yaml").read_text())
VALUES = {
    "default": {},
    "ha": HA,
    "everything": EVERYTHING,
    "no hook": {"uninstall": {"hook": False}},
    "no admission policy": {"admissionPolicy": {"enabled": False}},
} | {
    f"platform {name}": {"platform": name} for name in PLATFORMS
}

# Values that must be refused, and where.
WRONG = {
    "controller/replicas": {"controller": {"replicas": 0}},
    "cni/confdir": {"cni": {"confdir": "/etc"}},
    "cni/binDir": {"cni": {"binDir": "opt"}},
    "platform": {"platform": "minix"},
    "mode": {"mode": "loose"},
    "nodeProxy/accessLog": {"nodeProxy": {"accessLog": True}},
    "nodeProxy/terminationGracePeriodSeconds": {"nodeProxy": {"terminationGracePeriodSeconds": 5}},
    "nodeproxy": {"nodeproxy": {}},
    "image/pullSecrets": {"image": {"pullSecrets": ["name"]}},
    "admissionPolicy/enabled": {"admissionPolicy": {"enabled": "no"}},
}

AGENT_CAPABILITIES = {"SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "CHOWN", "FOWNER", "DAC_OVERRIDE"}

failures = []


def expect(right, message):
    if not right:
        failures.append(message)


def main():
    for chart in ("warren", "warren-crds"):
        for name, values in VALUES.items() if chart == "warren" else [("default", {})]:
            lint(chart, name, values)
            documents = render(chart, values)
            schemas(f"{chart} ({name})", documents)
            if chart == "warren":
                promises(name, values, documents)
    refusals()
    printed(sys.argv[1])
    if failures:
        print("\n".join(f"FAILED: {failure}" for failure in failures))
    print(f"{checks - len(failures)} passed, {len(failures)} failed")
    sys.exit(bool(failures))


checks = 0


def lint(chart, name, values):
    report = helm.lint(CHARTS / chart, values, strict=True, namespace="warren-system")
    # An icon is a matter of taste.
    messages = [m for m in report["messages"] if "icon" not in m["error"]]
    expect(not report["errors"] and not messages, f"{chart} ({name}): lint: {report['errors']} {messages}")


def render(chart, values, namespace="warren-system"):
    with helm.Chart.load(CHARTS / chart) as loaded:
        files = loaded.render(values, name="warren", namespace=namespace)
    texts = [text for path, text in sorted(files.items()) if not path.endswith(".txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def schemas(where, documents):
    global checks
    for document in documents:
        name = f"{where}: {document['kind']} {document['metadata']['name']}"
        checks += 1
        if document["kind"] in CUSTOM:
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                expect(False, f"{name}: Kubernetes {version}: {list(error.path)}: {error.message}")


def promises(name, values, documents):
    objects = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    expect(len(objects) == len(documents), f"{name}: an object is there twice")
    for document in documents:
        kind, metadata = document["kind"], document["metadata"]
        where = f"{name}: {kind} {metadata['name']}"
        expect(metadata["labels"]["app.kubernetes.io/part-of"] == "warren", f"{where}: labels")
        cluster = kind.startswith(("Cluster", "ValidatingAdmission"))
        expect(metadata.get("namespace") == (None if cluster else "warren-system"), f"{where}: namespace")
        if values.get("commonLabels"):
            expect(metadata["labels"].get("team") == "net", f"{where}: common label")
            expect(metadata["annotations"].get("contact") == "net@example.org", f"{where}: common annotation")
        for subject in document.get("subjects", []):
            expect(("ServiceAccount", subject["name"]) in objects or "uninstall" in subject["name"], f"{where}: {subject}")
        if "template" in document.get("spec", {}):
            pod(where, document, objects)

    config = {
        program: configuration(name, objects["ConfigMap", f"warren-{program}"], program)
        for program in ("controller", "cni", "node-proxy")
    }
    restricted(f"{name}: controller", objects["Deployment", "warren-controller"])
    agent(f"{name}: agent", objects["DaemonSet", "warren-cni"], config["cni"])
    proxy(f"{name}: proxy", objects["DaemonSet", "warren-node-proxy"], config["node-proxy"])
    for job in ("warren-uninstall-nodes", "warren-uninstall-leftovers"):
        expect((("Job", job) in objects) == (name != "no hook"), f"{name}: {job}")
        if ("Job", job) in objects:
            restricted(f"{name}: {job}", objects["Job", job])
    replicas = objects["Deployment", "warren-controller"]["spec"]["replicas"]
    expect((("PodDisruptionBudget", "warren-controller") in objects) == (replicas > 1), f"{name}: disruption budget")
    admission(name, objects, wanted=name != "no admission policy")


def admission(name, objects, wanted):
    """Only the controller writes its records, and nobody else's pods ever suffer from that."""
    policy = objects.get(("ValidatingAdmissionPolicy", "warren-enrolment-record"))
    binding = objects.get(("ValidatingAdmissionPolicyBinding", "warren-enrolment-record"))
    expect((policy is not None, binding is not None) == (wanted, wanted), f"{name}: admission policy")
    if not wanted or not policy or not binding:
        return
    spec = policy["spec"]
    expect(spec["failurePolicy"] == "Ignore", f"{name}: a broken admission policy stops pods")
    [rule] = spec["matchConstraints"]["resourceRules"]
    expect({"pods", "pods/status", "pods/binding"} <= set(rule["resources"]), f"{name}: admission: {rule['resources']}")
    expect("DELETE" not in rule["operations"], f"{name}: admission: pods cannot be deleted")
    account = objects["ServiceAccount", "warren-controller"]["metadata"]
    user = f"'system:serviceaccount:{account['namespace']}:{account['name']}'"
    expect(any(user in c["expression"] for c in spec["matchConditions"]), f"{name}: admission: not for {user}")
    expect(binding["spec"]["policyName"] == policy["metadata"]["name"], f"{name}: admission: the binding's policy")
    expect(binding["spec"]["validationActions"] == ["Deny"], f"{name}: admission: refuses nothing")


def pod(where, document, objects):
    template = document["spec"]["template"]
    spec = template["spec"]
    labels = template["metadata"]["labels"]
    for key, value in document["spec"].get("selector", {}).get("matchLabels", {}).items():
        expect(labels.get(key) == value, f"{where}: selector {key}")
    expect(("ServiceAccount", spec["serviceAccountName"]) in objects, f"{where}: service account")
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
    expect(mounted == set(volumes), f"{where}: volumes {sorted(volumes)}, mounted {sorted(mounted)}")
    for volume in volumes.values():
        if config := volume.get("configMap"):
            made = config["name"] == "warren-trust-bundle" or ("ConfigMap", config["name"]) in objects
            expect(made, f"{where}: ConfigMap {config['name']}")
    for container in spec["containers"]:
        expect(container["securityContext"]["readOnlyRootFilesystem"], f"{where}: root file system")
        expect(container["resources"]["requests"]["memory"], f"{where}: requests")
    if document["kind"] != "Job":
        [container] = spec["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            expect(probe in container, f"{where}: {probe}")


def restricted(where, document):
    """The Pod Security Standard `restricted`."""
    spec = document["spec"]["template"]["spec"]
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        expect(not spec.get(field), f"{where}: {field}")
    kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
    expect(kinds <= {"configMap", "emptyDir", "projected", "secret", "downwardAPI"}, f"{where}: volumes {kinds}")
    unprivileged(where, spec)


def unprivileged(where, spec):
    expect(spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] != 0, f"{where}: user")
    expect(spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", f"{where}: seccomp")
    for container in spec["containers"]:
        context = container["securityContext"]
        expect(context["allowPrivilegeEscalation"] is False, f"{where}: privilege escalation")
        expect(context["capabilities"] == {"drop": ["ALL"]}, f"{where}: capabilities {context['capabilities']}")
        expect(not context.get("privileged"), f"{where}: privileged")


def proxy(where, document, config):
    spec = document["spec"]["template"]["spec"]
    unprivileged(where, spec)
    expect(not spec.get("hostNetwork"), f"{where}: on the host's network")
    expect(spec["securityContext"]["runAsUser"] == 65532, f"{where}: user")
    expect(spec["automountServiceAccountToken"] is False, f"{where}: has a token of the API server")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    expect(volumes["secrets"]["emptyDir"]["medium"] == "Memory", f"{where}: keys on a disk")
    paths = {v["hostPath"]["path"] for v in volumes.values() if "hostPath" in v}
    expect(paths == {"/run/warren"}, f"{where}: paths of the host {paths}")
    update = document["spec"]["updateStrategy"]["rollingUpdate"]
    expect(update["maxUnavailable"] == 0 and update["maxSurge"] != 0, f"{where}: {update}")
    expect(config["terminationGraceSeconds"] == spec["terminationGracePeriodSeconds"], f"{where}: grace period")


def agent(where, document, config):
    spec = document["spec"]["template"]["spec"]
    [container] = spec["containers"]
    context = container["securityContext"]
    expect(context["privileged"] is False, f"{where}: privileged")
    expect(context["capabilities"]["drop"] == ["ALL"], f"{where}: capabilities")
    expect(set(context["capabilities"]["add"]) == AGENT_CAPABILITIES, f"{where}: {context['capabilities']}")
    expect(spec["hostNetwork"] and spec["dnsPolicy"] == "ClusterFirstWithHostNet", f"{where}: network")
    expect({"operator": "Exists"} in spec["tolerations"], f"{where}: tolerations")
    expect(spec["automountServiceAccountToken"] is False, f"{where}: has a token of the API server")
    # What the file names is what is mounted, at the node's own path: the runtime reads these files, too.
    config = config["cni"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    for volume, field in (("cni-conf", "confDir"), ("cni-bin", "binDir"), ("netns", "netnsDir")):
        same = {volumes[volume]["hostPath"]["path"], mounts[volume]["mountPath"], config[field]}
        expect(len(same) == 1, f"{where}: {field}: {same}")
    expect(mounts["netns"]["mountPropagation"] == "HostToContainer", f"{where}: namespaces of later pods")
    expect(mounts["proc"]["mountPath"] == config["procDir"], f"{where}: procDir")


def configuration(name, config_map, program):
    """The configuration file of a program. Every field that is written is one of its reference."""
    page = f"docs/reference/{program}.md"
    documented = set(re.findall(r"^\| `([A-Za-z.]+)` \|", (ROOT / page).read_text(), re.M))
    [text] = config_map["data"].values()
    config = yaml.safe_load(text)
    for field in leaves(config):
        expect(field in documented, f"{name}: {config_map['metadata']['name']}: field {field} is not in {page}")
    return config


def leaves(value, path=""):
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, name)
        else:
            yield name


def refusals():
    global checks
    with helm.Chart.load(CHARTS / "warren") as chart:
        for where, values in WRONG.items():
            checks += 1
            try:
                chart.validate_schema(values)
                expect(False, f"values {values} are accepted")
            except helm.HelmError as error:
                expect(where.split("/")[-1] in str(error), f"values {values}: {error}")
    checks += 1
    try:
        render("warren", {}, namespace="default")
        expect(False, "the chart goes into another namespace")
    except helm.HelmError as error:
        expect("warren-system" in str(error), f"another namespace: {error}")


# Options of `warren install`, and the values that say the same.
PRINTED = [
    ([], {}),
    *([["--platform", name], {"platform": name}] for name in PLATFORMS),
    *([["--platform", name, "--ha"], {"platform": name} | HA] for name in PLATFORMS),
    (
        ["--registry", "r.example.org/w", "--tag", "2", "--mode", "strict", "--trust-domain", "x.org", "--log", "debug"],
        {"image": {"registry": "r.example.org/w", "tag": "2"}, "mode": "strict", "trustDomain": "x.org", "logLevel": "debug"},
    ),
]


def printed(warren):
    """`warren install` prints what Helm makes of the same values."""
    global checks
    for options, values in PRINTED:
        checks += 1
        text = subprocess.run([warren, "install", *options], check=True, capture_output=True, text=True).stdout
        ours = comparable(yaml.safe_load_all(text))
        helms = comparable(render("warren", values | {"uninstall": {"hook": False}}) + render("warren-crds", {}))
        namespace = ours.pop(("Namespace", "warren-system"), None)
        expect(namespace is not None, f"warren install {options}: no namespace")
        for key in ours.keys() | helms.keys():
            expect(ours.get(key) == helms.get(key), f"warren install {options}: {key} is not Helm's")


def comparable(documents):
    """By kind and name, without what tells the two ways apart."""
    objects = {}
    for document in documents:
        labels = document["metadata"].get("labels", {})
        labels.pop("app.kubernetes.io/managed-by", None)
        template = document.get("spec", {}).get("template", {})
        if isinstance(template, dict):
            template.get("metadata", {}).get("annotations", {}).pop("warren-mesh.io/config-hash", None)
        config = document.get("data", {})
        # Written in another order.
        document["data"] = {k: yaml.safe_load(v) if k.endswith(".yaml") else v for k, v in config.items()}
        objects[document["kind"], document["metadata"]["name"]] = document
    return objects


if __name__ == "__main__":
    main()
