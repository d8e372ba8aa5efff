# What runs on the machines of the test cluster, and its certificates. Sourced by `cluster`.

# service MACHINE NAME: makes the program that starts it from standard input, a command
service() {
  local file=$machines/$1/services/$2
  { echo '#!/bin/sh'; printf 'exec '; cat; } >"$file"
  chmod +x "$file"
}

# control_plane_services NODES
control_plane_services() {
  local pki=$state/pki component controllers='*'
  # Without nodes the pods and Services are a test's own: only what makes namespaces usable.
  (($1 > 0)) || controllers=namespace-controller,serviceaccount-controller,root-ca-certificate-publisher-controller,garbage-collector-controller,clusterrole-aggregation-controller
  service control-plane etcd <<END
etcd --data-dir /var/lib/etcd/data --unsafe-no-fsync --logger zap --log-level warn
END
  service control-plane kube-apiserver <<END
$bin/kube-apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address $api --bind-address 0.0.0.0 --secure-port 6443 \\
  --tls-cert-file $pki/kube-apiserver.crt --tls-private-key-file $pki/kube-apiserver.key --client-ca-file $pki/ca.crt \\
  --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged \\
  --service-account-issuer https://kubernetes.default.svc --service-account-signing-key-file $pki/sa.key \\
  --service-account-key-file $pki/sa.pub --service-cluster-ip-range $net.128.0/20 \\
  --kubelet-client-certificate $pki/kubelet-client.crt --kubelet-client-key $pki/kubelet-client.key \\
  --kubelet-preferred-address-types InternalIP --profiling=false \\
  --proxy-client-cert-file $pki/front-proxy.crt --proxy-client-key-file $pki/front-proxy.key \\
  --requestheader-client-ca-file $pki/ca.crt --requestheader-allowed-names front-proxy \\
  --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \\
  --requestheader-extra-headers-prefix X-Remote-Extra-
END
  for component in kube-controller-manager kube-scheduler; do kubeconfig "$pki/$component.conf" $component; done
  service control-plane kube-controller-manager <<END
$bin/kube-controller-manager --kubeconfig $pki/kube-controller-manager.conf --leader-elect=false \\
  --authentication-kubeconfig $pki/kube-controller-manager.conf --authorization-kubeconfig $pki/kube-controller-manager.conf \\
  --use-service-account-credentials --service-account-private-key-file $pki/sa.key --root-ca-file $pki/ca.crt \\
  --cluster-signing-cert-file $pki/ca.crt --cluster-signing-key-file $pki/ca.key --controllers '$controllers' --profiling=false
END
  (($1 > 0)) || return 0
  service control-plane kube-scheduler <<END
$bin/kube-scheduler --kubeconfig $pki/kube-scheduler.conf --leader-elect=false \\
  --authentication-kubeconfig $pki/kube-scheduler.conf --authorization-kubeconfig $pki/kube-scheduler.conf --profiling=false
END
}

node_services() {
  local node=$1 pki=$state/pki conf=/etc/warren-kube
  certificate "$node" "/O=system:nodes/CN=system:node:$node"
  enter "$node" mkdir -p $conf /etc/cni/net.d /opt/cni/bin
  enter "$node" cp -t /opt/cni/bin /usr/lib/cni/{ptp,host-local,portmap,loopback}
  kubeconfig "$machines/$node/kubelet.conf" "$node"
  kubeconfig "$machines/$node/kube-proxy.conf" kube-proxy

  write "$node" /etc/cni/net.d/10-pods.conflist <<END
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    { "type": "ptp", "ipam": { "type": "host-local", "ranges": [[{ "subnet": "$(pods "$node")" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
END
  # Without CAP_SYS_RESOURCE, as in many containers, no oom_score_adj can be lowered.
  write "$node" $conf/containerd.toml <<END
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/warren-kube/app:dev"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    options = { SystemdCgroup = false }
END
  write "$node" $conf/kubelet.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: { x509: { clientCAFile: $pki/ca.crt }, anonymous: { enabled: false } }
authorization: { mode: Webhook }
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
clusterDNS: ["$dns"]
clusterDomain: cluster.local
resolvConf: ""
serializeImagePulls: false
localStorageCapacityIsolation: false
imageGCHighThresholdPercent: 100
evictionHard: { memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%" }
volumePluginDir: /var/lib/kubelet/volume-plugins
nodeStatusUpdateFrequency: 5s
syncFrequency: 10s
END
  write "$node" $conf/kube-proxy.yaml <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: $node
clientConnection: { kubeconfig: $machines/$node/kube-proxy.conf }
oomScoreAdj: 0
# The host's, which no machine may change.
conntrack: { maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s }
END
  service "$node" containerd <<<"containerd --config $conf/containerd.toml"
  service "$node" kubelet <<END
$bin/kubelet --config $conf/kubelet.yaml --kubeconfig $machines/$node/kubelet.conf --hostname-override $node --node-ip $(address "$node")
END
  service "$node" kube-proxy <<<"$bin/kube-proxy --config $conf/kube-proxy.yaml"
}

# write MACHINE FILE: standard input into a file of the machine
write() {
  enter "$1" tee "$2" >/dev/null
}

certificates() {
  local pki=$state/pki
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=warren-kube-ca \
    -keyout "$pki/ca.key" -out "$pki/ca.crt" 2>/dev/null
  openssl ecparam -genkey -name prime256v1 -noout -out "$pki/sa.key"
  openssl ec -in "$pki/sa.key" -pubout -out "$pki/sa.pub" 2>/dev/null
  certificate kube-apiserver /CN=kube-apiserver \
    "IP:$api,IP:$net.128.1,IP:127.0.0.1,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  certificate admin /O=system:masters/CN=admin
  certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
  certificate front-proxy /CN=front-proxy
  local component
  for component in kube-controller-manager kube-scheduler kube-proxy; do certificate $component "/CN=system:$component"; done
}

# certificate NAME SUBJECT [ALTERNATIVE NAMES]
certificate() {
  local file=$state/pki/$1
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "$2" -keyout "$file.key" 2>/dev/null |
    openssl x509 -req -CA "$state/pki/ca.crt" -CAkey "$state/pki/ca.key" -CAcreateserial -days 30 -out "$file.crt" \
      -extfile <(echo "extendedKeyUsage=serverAuth,clientAuth"; [ $# -lt 3 ] || echo "subjectAltName=$3") 2>/dev/null
}

# kubeconfig FILE NAME: for the owner of the certificate NAME
kubeconfig() {
  local pki=$state/pki
  cat >"$1" <<END
apiVersion: v1
kind: Config
clusters: [{ name: $name, cluster: { server: "https://$api:6443", certificate-authority-data: $(base64 -w0 "$pki/ca.crt") } }]
users: [{ name: $2, user: { client-certificate-data: $(base64 -w0 "$pki/$2.crt"), client-key-data: $(base64 -w0 "$pki/$2.key") } }]
contexts: [{ name: $name, context: { cluster: $name, user: $2 } }]
current-context: $name
END
}
