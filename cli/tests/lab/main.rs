//! `warren lab` as a person uses it, without a mesh: namespaces, the stock CNI plugins, Services, names, probes,
//! Deployments, and that nothing is left. Needs root, like the lab itself.

mod harness;

use std::time::Duration;

use harness::{Lab, eventually, namespaces_of};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/lab/demo.yaml");

#[test]
fn names_and_services_work_from_every_pod() {
    let lab = Lab::up("names", &["-f", DEMO]);
    // At once: no interface is still looking for others with its IPv6 address (that takes 2 s).
    let full = "http://web.demo.svc.cluster.local/";
    lab.exec("stranger", &["curl", "-6sS", "--max-time", "1.5", full])
        .good();
    let client = lab.pod("client").ips;
    for url in ["http://web/", "http://web.demo/", "http://web.demo.svc/"] {
        let answer = lab
            .exec("client", &["curl", "-sS", "--max-time", "5", url])
            .good();
        assert!(
            answer.contains(&format!("called by {}", client[0])),
            "{url}: {answer}"
        );
    }
    let over_v6 = lab
        .exec(
            "client",
            &["curl", "-6sS", "--max-time", "5", "http://web/"],
        )
        .good();
    assert!(
        over_v6.contains(&format!("called by {}", client[1])),
        "{over_v6}"
    );

    lab.exec("stranger", &["curl", "-sS", "--max-time", "5", full])
        .good();
    let short = lab.exec(
        "stranger",
        &["curl", "-sS", "--max-time", "5", "http://web/"],
    );
    assert_eq!(
        short.code, 6,
        "a short name is known in its own namespace only: {short:?}"
    );

    // Both endpoints are used, also by one of themselves, whichever it reaches.
    let mut seen = std::collections::BTreeSet::new();
    eventually("both endpoints", || {
        let answer = lab
            .exec(
                "deploy/web",
                &["curl", "-sS", "--max-time", "5", "http://web/"],
            )
            .good();
        seen.extend(answer.split(' ').next().map(str::to_owned));
        if seen.len() == 2 {
            Ok(())
        } else {
            Err(format!("{seen:?}"))
        }
    });

    let log = lab.run(&["logs", "-n", "demo", "deploy/web"]).good();
    assert!(log.contains("GET / HTTP"), "{log}");
}

#[test]
fn exec_is_like_being_the_container() {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: plain}
spec:
  securityContext: {runAsUser: 65534, runAsGroup: 65534}
  containers:
  - name: c
    command: [sleep, infinity]
    env:
    - {name: GREETING, value: "hello from $(HOSTNAME)"}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
"#;
    let lab = Lab::up_with("exec", manifest, &[]);
    let script = "echo $GREETING on $NODE; id -u; hostname; exit 7";
    let done = lab.exec("plain", &["sh", "-c", script]);
    assert_eq!(done.stdout, "hello from plain on node-1\n65534\nplain\n");
    assert_eq!(done.code, 7);
    let missing = lab.run(&["exec", "nobody", "--", "true"]);
    assert!(
        missing.stderr.contains("there is no pod nobody"),
        "{missing:?}"
    );

    let pod = lab.pod("plain");
    assert_eq!(pod.identity, "spiffe://cluster.local/ns/default/sa/default");
    assert!(
        pod.ready && pod.pid != 0 && std::path::Path::new(&pod.netns).exists(),
        "{pod:?}"
    );
    let environment = std::fs::read(format!("/proc/{}/environ", pod.pid)).unwrap();
    assert!(String::from_utf8_lossy(&environment).contains("HOSTNAME=plain"));
}

#[test]
fn a_rollout_keeps_the_service_up() {
    let lab = Lab::up("roll", &["-f", DEMO]);
    let before = lab.pods();
    lab.run(&["rollout", "restart", "deploy/web"]).good();
    let rolled = std::cell::Cell::new(false);
    eventually("the rollout", || {
        let answer = lab.exec("client", &["curl", "-sS", "--max-time", "5", "http://web/"]);
        assert_eq!(
            answer.code, 0,
            "a request failed while pods were replaced: {answer:?}"
        );
        let old = |name: &str| before.iter().any(|p| p.name == name);
        let web: Vec<_> = lab
            .pods()
            .into_iter()
            .filter(|p| p.name.starts_with("web-"))
            .collect();
        rolled.set(web.len() == 2 && web.iter().all(|p| p.ready && !old(&p.name)));
        if rolled.get() {
            Ok(())
        } else {
            Err(format!("{web:?}"))
        }
    });
    lab.run(&["rollout", "status", "deploy/web"]).good();

    // A pod that is deleted is replaced; a label on the namespace restarts nothing.
    let victim = lab
        .pods()
        .into_iter()
        .find(|p| p.name.starts_with("web-"))
        .unwrap();
    lab.run(&["delete", "pod", &victim.name]).good();
    assert!(
        lab.pods().iter().all(|p| p.name != victim.name),
        "delete returned too early"
    );
    lab.run(&["rollout", "status", "deploy/web"]).good();
    let pids = |lab: &Lab| {
        lab.pods()
            .iter()
            .map(|p| (p.name.clone(), p.pid))
            .collect::<Vec<_>>()
    };
    let running = pids(&lab);
    lab.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: demo, labels: {a: b}}\n")
        .good();
    assert_eq!(pids(&lab), running);
}

#[test]
fn probes_and_restart_policies_are_honoured() {
    let manifest = r#"
apiVersion: v1
kind: Service
metadata: {name: flag}
spec: {selector: {app: flag}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: flag, labels: {app: flag}}
spec:
  containers:
  - name: c
    command: [sleep, infinity]
    readinessProbe: {exec: {command: [test, -e, "/tmp/warren-PREFIX-flag"]}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: once}
spec: {restartPolicy: Never, containers: [{name: c, command: ["true"]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: again}
spec:
  containers:
  - name: c
    command: [sh, -c, "echo started; sleep infinity"]
    livenessProbe: {tcpSocket: {port: 9}, periodSeconds: 1, failureThreshold: 2}
"#;
    let flag = format!("/tmp/warren-{}-flag", std::process::id());
    std::fs::write(&flag, "").unwrap();
    let manifest = manifest.replace("PREFIX", &std::process::id().to_string());
    let lab = Lab::up_with("probes", &manifest, &[]);
    assert_eq!(lab.pod("once").phase, "Succeeded");
    assert_eq!(lab.endpoints("flag"), lab.pod("flag").ips);
    std::fs::remove_file(&flag).unwrap();
    eventually("the endpoint to go", || match &lab.endpoints("flag")[..] {
        [] => Ok(()),
        left => Err(format!("{left:?}")),
    });
    // Refused at once, as kube-proxy does, and not lost on the way.
    let refused = lab.exec("again", &["curl", "-sS", "--max-time", "5", "http://flag/"]);
    assert_eq!(refused.code, 7, "{refused:?}");
    eventually("the liveness probe to restart it", || {
        let pod = lab.pod("again");
        if pod.restarts > 0 {
            Ok(())
        } else {
            Err(format!("{pod:?}"))
        }
    });
}

#[test]
fn up_says_what_is_not_ready_and_why() {
    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: broken}\nspec: {containers: \
                    [{name: c, command: [sh, -c, 'echo this is why; exit 3']}]}\n";
    let (lab, done) = Lab::try_up("broken", manifest, &["--timeout", "2"]);
    assert_ne!(done.code, 0);
    for part in [
        "pod default/broken",
        "exit code 3",
        "this is why",
        "lab down",
    ] {
        assert!(done.stderr.contains(part), "{part}: {done:?}");
    }
    let again = lab.run(&["up", "--no-mesh"]);
    assert!(again.stderr.contains("is up already"), "{again:?}");
}

#[test]
fn mistakes_start_nothing_and_change_nothing() {
    let bad = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: node-7, containers: [{name: c}]}\n";
    let (lab, done) = Lab::try_up("bad", bad, &[]);
    assert_ne!(done.code, 0);
    for part in ["spec.nodeName", "spec.containers[0].command", ".yaml:1"] {
        assert!(done.stderr.contains(part), "{part}: {done:?}");
    }
    assert!(namespaces_of(lab.name()).is_empty());

    let good = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, command: [sleep, infinity]}]}\n";
    let lab = Lab::up_with("bad2", good, &[]);
    let before = lab.pods();
    let done = lab.apply(&good.replace("infinity", "1d"));
    assert!(done.stderr.contains("cannot be changed"), "{done:?}");
    assert_eq!(lab.pods(), before);
}

#[test]
fn a_killed_daemon_leaves_nothing_after_down() {
    let (one, two) = (
        Lab::up("kill", &["-f", DEMO]),
        Lab::up("kill-2", &["-f", DEMO]),
    );
    assert_ne!(
        one.pod("client").ips,
        two.pod("client").ips,
        "labs have ranges of their own"
    );
    let pids: Vec<u32> = one.pods().iter().map(|p| p.pid).collect();
    let file = format!("/run/warren/lab/{}/daemon.pid", one.name());
    let daemon = std::fs::read_to_string(&file).unwrap();
    harness::kill(&daemon);
    // The kernel ends its processes with it.
    let runs = |pid: &&u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
    };
    eventually("its pods to end", || {
        match pids.iter().filter(runs).count() {
            0 => Ok(()),
            n => Err(format!("{n} still run")),
        }
    });
    let list = one.run(&["list"]).good();
    assert!(list.contains("leftovers"), "{list}");
    one.run(&["down"]).good();
    assert!(namespaces_of(one.name()).is_empty());
    assert!(!std::path::Path::new(&file).parent().unwrap().exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("/{}/", one.name())), "{mounts}");

    // The other one, whose name begins with this one's, is untouched.
    let deadline = Duration::from_secs(5).as_secs().to_string();
    two.exec(
        "client",
        &["curl", "-sS", "--max-time", &deadline, "http://web/"],
    )
    .good();
}

#[test]
fn routes_and_policies_are_handed_to_the_controller() {
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";
    let lab = Lab::up_with("routes", service, &["--nodes", "3", "--zones", "a,b"]);
    let nodes = lab.run(&["get", "nodes", "-o", "json"]).good();
    let nodes: serde_json::Value = serde_json::from_str(&nodes).unwrap();
    let zones: Vec<&str> = (0..3).map(|i| nodes[i]["zone"].as_str().unwrap()).collect();
    assert_eq!(zones, ["a", "b", "a"], "by turns");

    let published = |file: &str| -> serde_json::Value {
        let dir = format!("/run/warren/lab/{}/controller/manifests", lab.name());
        let text = std::fs::read_to_string(format!("{dir}/{file}")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let label = &published("20-nodes.json")["items"][1]["metadata"]["labels"];
    assert_eq!(label["topology.kubernetes.io/zone"], "b");

    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  \
                 parentRefs: [{group: '', kind: Service, name: web}]\n  rules: [{backendRefs: [{name: web, port: 80}]}]\n";
    let policy = "---\napiVersion: warren-mesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec:\n  \
                  targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: 1s}\n";
    let said = lab.apply(&format!("{route}{policy}")).good();
    assert!(said.contains("HTTPRoute default/r created"), "{said}");
    assert!(said.contains("TrafficPolicy default/p created"), "{said}");
    let first = published("70-routes.json");
    assert_eq!(first["items"].as_array().unwrap().len(), 2);
    let created = first["items"][0]["metadata"]["creationTimestamp"].clone();
    assert!(created.is_string(), "{first}");

    assert!(lab.apply(route).good().contains("unchanged"));
    let edited = route.replace("port: 80}]}]", "port: 80, weight: 2}]}]");
    assert!(lab.apply(&edited).good().contains("configured"));
    let route_now = &published("70-routes.json")["items"][0];
    assert_eq!(route_now["spec"]["rules"][0]["backendRefs"][0]["weight"], 2);
    assert_eq!(route_now["metadata"]["creationTimestamp"], created, "kept");

    let mistaken = lab.apply(&route.replace("port: 80}", "port: 80, weight: -1}"));
    assert_ne!(mistaken.code, 0);
    let message =
        ":6: HTTPRoute default/r: spec.rules[0].backendRefs[0].weight: expected a number from 0";
    assert!(mistaken.stderr.contains(message), "{mistaken:?}");

    let deleted = lab.run(&["delete", "httproute", "r"]).good();
    assert!(deleted.contains("HTTPRoute r deleted"), "{deleted}");
    let left = &published("70-routes.json")["items"];
    assert_eq!(left.as_array().unwrap().len(), 1);
}
