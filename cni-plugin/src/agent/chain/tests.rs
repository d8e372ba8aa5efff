use super::*;

struct Node {
    directory: tempfile::TempDir,
    chain: Chain,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = AgentConfig::default();
        config.cni.conf_dir = directory.path().join("net.d");
        config.cni.bin_dir = directory.path().join("bin");
        fs::create_dir_all(&config.cni.conf_dir).unwrap();
        Self {
            chain: Chain::new(&config),
            directory,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("net.d").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), text).unwrap();
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.file(name)).unwrap()).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.directory.path().join("net.d"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

const LIST: &str = r#"{"cniVersion":"1.0.0","name":"net","zebra":1,"plugins":[{"type":"bridge","ipam":{}},{"type":"portmap"}]}"#;

#[test]
fn the_entry_is_appended_once_and_the_rest_is_kept() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    node.write("20-other.conflist", LIST);
    let file = node.file("10-net.conflist");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();

    assert_eq!(node.chain.ensure().unwrap(), Ensured::In(file.clone()));
    let list = node.read("10-net.conflist");
    assert_eq!(
        list["plugins"][2],
        json!({"type": "warren-cni", "socket": "/run/warren/cni.sock", "logLevel": "info",
               "excludeNamespaces": ["warren-system", "kube-system"]})
    );
    let fields: Vec<&String> = list.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["cniVersion", "name", "zebra", "plugins"]);
    assert_eq!(
        node.read("20-other.conflist"),
        serde_json::from_str::<Value>(LIST).unwrap()
    );
    let before = fs::metadata(&file).unwrap();
    assert_eq!(before.mode() & 0o777, 0o640);
    let binary = fs::metadata(node.directory.path().join("bin/warren-cni")).unwrap();
    assert_eq!(binary.mode() & 0o777, 0o755);

    node.chain.ensure().unwrap();
    assert_eq!(
        fs::metadata(&file).unwrap().ino(),
        before.ino(),
        "not written again"
    );

    node.chain.remove().unwrap();
    assert_eq!(
        node.read("10-net.conflist"),
        serde_json::from_str::<Value>(LIST).unwrap()
    );
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
    assert_eq!(
        fs::read_dir(node.directory.path().join("bin"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(node.names(), ["10-net.conflist", "20-other.conflist"]);
}

#[test]
fn an_entry_that_was_changed_is_put_right_where_it_is() {
    let node = Node::new();
    node.write(
        "10-net.conflist",
        r#"{"plugins":[{"type":"bridge"},{"type":"warren-cni","socket":"/old"},{"type":"portmap"}]}"#,
    );
    node.chain.ensure().unwrap();
    let plugins = node.read("10-net.conflist")["plugins"].clone();
    assert_eq!(plugins[1]["socket"], "/run/warren/cni.sock");
    assert_eq!(plugins[2]["type"], "portmap");
    assert_eq!(plugins.as_array().unwrap().len(), 3);
}

#[test]
fn a_single_plugin_becomes_a_list_and_comes_back() {
    let node = Node::new();
    let conf = "{ \"cniVersion\": \"0.4.0\",\n\"name\": \"net\", \"type\": \"ptp\" }";
    node.write("10-net.conf", conf);
    fs::set_permissions(node.file("10-net.conf"), fs::Permissions::from_mode(0o600)).unwrap();
    node.chain.ensure().unwrap();
    assert_eq!(
        node.names(),
        ["10-net.conf.warren-saved", "10-net.conflist"]
    );
    let list = node.read("10-net.conflist");
    assert_eq!(list["cniVersion"], "0.4.0");
    assert_eq!(list["name"], "net");
    assert_eq!(list["plugins"][0]["type"], "ptp");
    assert_eq!(list["plugins"][1]["type"], "warren-cni");
    assert_eq!(
        fs::metadata(node.file("10-net.conflist")).unwrap().mode() & 0o777,
        0o600
    );

    node.chain.ensure().unwrap();
    node.chain.remove().unwrap();
    assert_eq!(node.names(), ["10-net.conf"]);
    assert_eq!(fs::read_to_string(node.file("10-net.conf")).unwrap(), conf);
}

#[test]
fn a_converted_list_that_others_changed_is_kept() {
    let node = Node::new();
    node.write("10-net.conf", r#"{"name":"net","type":"ptp"}"#);
    node.chain.ensure().unwrap();
    let mut list = node.read("10-net.conflist");
    list["plugins"]
        .as_array_mut()
        .unwrap()
        .insert(1, json!({"type": "portmap"}));
    node.write("10-net.conflist", &list.to_string());
    node.chain.remove().unwrap();
    assert_eq!(node.names(), ["10-net.conflist"]);
    assert_eq!(
        node.read("10-net.conflist")["plugins"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn broken_files_are_skipped_and_an_empty_directory_waits() {
    let node = Node::new();
    assert_eq!(node.chain.ensure().unwrap(), Ensured::NoNetwork);
    node.write("00-broken.conflist", "{");
    node.write("05-empty.conflist", r#"{"plugins":[]}"#);
    node.write("10-net.conflist", LIST);
    assert_eq!(
        node.chain.ensure().unwrap(),
        Ensured::In(node.file("10-net.conflist"))
    );
    assert_eq!(
        fs::read_to_string(node.file("00-broken.conflist")).unwrap(),
        "{"
    );
}

#[tokio::test]
async fn a_rewritten_file_is_repaired_at_once() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    let keeper = tokio::spawn(node.chain.clone().keep(watch::Sender::new(None)));
    let inserted = || async {
        while node.read("10-net.conflist")["plugins"]
            .as_array()
            .unwrap()
            .len()
            != 3
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let soon = Duration::from_secs(5);
    tokio::time::timeout(soon, inserted()).await.unwrap();
    for _ in 0..3 {
        // As a program that owns the file does: by rename.
        node.write("next.tmp", LIST);
        fs::rename(node.file("next.tmp"), node.file("10-net.conflist")).unwrap();
        tokio::time::timeout(soon, inserted()).await.unwrap();
    }
    keeper.abort();
}

#[test]
fn a_symbolic_link_stays_one() {
    let node = Node::new();
    let elsewhere = node.directory.path().join("elsewhere.json");
    fs::write(&elsewhere, LIST).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o604)).unwrap();
    let file = node.file("10-net.conflist");
    std::os::unix::fs::symlink(&elsewhere, &file).unwrap();

    assert_eq!(node.chain.ensure().unwrap(), Ensured::In(file.clone()));
    assert!(fs::symlink_metadata(&file).unwrap().is_symlink());
    assert_eq!(node.read("10-net.conflist")["plugins"][2]["type"], PLUGIN);
    assert_eq!(fs::metadata(&elsewhere).unwrap().mode() & 0o777, 0o604);
    node.chain.remove().unwrap();
    assert!(fs::symlink_metadata(&file).unwrap().is_symlink());
    assert_eq!(
        node.read("10-net.conflist"),
        serde_json::from_str::<Value>(LIST).unwrap()
    );
    assert_eq!(node.names(), ["10-net.conflist"], "no file is left over");
}
