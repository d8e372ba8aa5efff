//! Real servers as pod commands, each with its own directory and nothing of the host's configuration.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::run;
use crate::scenario::Scenario;

/// nginx on port 80, both families; answers `<text> for <caller's address>` and logs the address.
/// Returns the command.
pub fn nginx(s: &Scenario, text: &str) -> Vec<String> {
    let directory = s.fresh_path("nginx");
    std::fs::create_dir(&directory).expect("the scenario's directory can be written");
    let at = directory.display();
    let configuration = format!(
        "user root; worker_processes 1; daemon off; pid {at}/pid; error_log stderr warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           access_log /dev/stdout combined;\n\
           client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
           uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
           server {{ listen 80; listen [::]:80; location / {{ return 200 \"{text} for $remote_addr\\n\"; }} }}\n\
         }}\n"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, configuration).expect("the scenario's directory can be written");
    [
        "/usr/sbin/nginx",
        "-e",
        "stderr",
        "-c",
        &file.display().to_string(),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// nginx on port 80, and with TLS on 443: answers `<name> to <server name>`. Returns the command and its certificate, which
/// is its own root and good for `example.com`, `*.example.com` and `*.deep.example.com`.
pub fn nginx_tls(s: &Scenario, name: &str) -> (Vec<String>, PathBuf) {
    let directory = s.fresh_path(&format!("nginx-tls-{name}"));
    std::fs::create_dir(&directory).expect("the scenario's directory can be written");
    let at = directory.display();
    let (certificate, key) = (directory.join("crt"), directory.join("key"));
    let names = ["", "*.", "*.deep."].map(|prefix| format!("{prefix}example.com"));
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate can be made");
    for (file, text) in [
        (&certificate, made.cert.pem()),
        (&key, made.signing_key.serialize_pem()),
    ] {
        std::fs::write(file, text).expect("the scenario's directory can be written");
    }
    let configuration = format!(
        "user root; worker_processes 1; daemon off; pid {at}/pid; error_log stderr warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
           uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
           ssl_certificate {at}/crt; ssl_certificate_key {at}/key;\n\
           server {{ listen 80; listen [::]:80; listen 443 ssl; listen [::]:443 ssl;\n\
             location / {{ return 200 \"{name} to $ssl_server_name\\n\"; }} }}\n\
         }}\n"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, configuration).expect("the scenario's directory can be written");
    let file = file.display().to_string();
    let command = ["/usr/sbin/nginx", "-e", "stderr", "-c", &file].map(str::to_owned);
    (command.to_vec(), certificate)
}

/// nginx with files on disk: HTTP/1 on port 80, HTTP/2 with prior knowledge on 81. `/large` has
/// [`LARGE`] bytes, `/small` a line, `/text` is sent in chunks to whom it may be compressed for.
pub fn nginx_files(s: &Scenario) -> Vec<String> {
    let directory = s.fresh_path("nginx-files");
    let root = directory.join("root");
    std::fs::create_dir_all(&root).expect("the scenario's directory can be written");
    let large: Vec<u8> = (0..LARGE).map(|i| (i % 251) as u8).collect();
    let text = "a line that can be compressed\n".repeat(10_000);
    for (name, contents) in [
        ("large", large),
        ("small", b"small\n".to_vec()),
        ("text", text.into_bytes()),
    ] {
        std::fs::write(root.join(name), contents).expect("the scenario's directory can be written");
    }
    let at = directory.display();
    let configuration = format!(
        "user root; worker_processes 1; daemon off; pid {at}/pid; error_log stderr warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           access_log off; root {at}/root; default_type text/plain; keepalive_requests 1000000;\n\
           gzip on; gzip_types text/plain; gzip_min_length 1000; gzip_http_version 1.1;\n\
           client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
           uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
           server {{ listen 80; listen [::]:80; listen 81 http2; listen [::]:81 http2; }}\n\
         }}\n"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, configuration).expect("the scenario's directory can be written");
    let file = file.display().to_string();
    ["/usr/sbin/nginx", "-e", "stderr", "-c", &file]
        .map(str::to_owned)
        .to_vec()
}

/// Size of `/large` of [`nginx_files`].
pub const LARGE: usize = 20_000_000;

/// Several servers as one pod's command. None may need quoting beyond single quotes.
pub fn together(commands: &[Vec<String>]) -> Vec<String> {
    let all: Vec<String> = commands
        .iter()
        .map(|words| {
            words
                .iter()
                .map(|w| format!("'{w}'"))
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    // When the shell is told to end, so are they.
    let script = format!("trap 'kill $(jobs -p)' TERM; {} & wait", all.join(" & "));
    ["sh", "-c", &script].map(str::to_owned).to_vec()
}

/// MariaDB on port 3306 with the user `mesh` without password; runs as the user `mysql`.
pub fn mariadb(s: &Scenario) -> Vec<String> {
    let directory = owned_directory(s, "mariadb", "mysql");
    let data = directory.join("data");
    let mut install = as_user("mysql", "/usr/bin/mariadb-install-db");
    install.args([
        "--no-defaults",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]);
    run(
        install.arg(format!("--datadir={}", data.display())),
        Duration::from_secs(60),
    )
    .expect_ok();
    // One statement a line.
    let init = s.file(
        "init.sql",
        "CREATE USER mesh@'%';\nGRANT ALL ON *.* TO mesh@'%';\n",
    );
    let at = directory.display();
    command(
        "mysql",
        "/usr/sbin/mariadbd",
        &[
            "--no-defaults".into(),
            format!("--datadir={}", data.display()),
            format!("--socket={at}/socket"),
            format!("--pid-file={at}/pid"),
            format!("--init-file={}", init.display()),
            "--bind-address=*".into(),
            "--port=3306".into(),
            "--skip-name-resolve".into(),
            "--innodb-buffer-pool-size=16M".into(),
            // The greeting is read and the connection dropped, which it counts as an error of the host.
            "--max-connect-errors=1000000".into(),
        ],
    )
}

/// PostgreSQL on port 5432 with the superuser `postgres` without password; runs as `postgres`.
pub fn postgres(s: &Scenario) -> Vec<String> {
    let directory = owned_directory(s, "postgres", "postgres");
    let data = directory.join("data");
    let mut install = as_user("postgres", &postgres_program("initdb"));
    install.args([
        "--auth=trust",
        "--no-sync",
        "--encoding=UTF8",
        "--locale=C",
        "-D",
    ]);
    run(install.arg(&data), Duration::from_secs(60)).expect_ok();
    let rules = "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n";
    std::fs::write(data.join("pg_hba.conf"), rules)
        .expect("the scenario's directory can be written");
    command(
        "postgres",
        &postgres_program("postgres"),
        &[
            "-D".into(),
            data.display().to_string(),
            "-k".into(),
            directory.display().to_string(),
            "-c".into(),
            "listen_addresses=*".into(),
            "-c".into(),
            "fsync=off".into(),
            "-c".into(),
            // No dynamic segment that would outlive a kill.
            "dynamic_shared_memory_type=mmap".into(),
        ],
    )
}

/// Redis on port 6379; runs as `nobody`.
pub fn redis(s: &Scenario) -> Vec<String> {
    let directory = owned_directory(s, "redis", "nobody");
    let arguments =
        "--port 6379 --bind * -::* --protected-mode no --appendonly no --save".split(' ');
    let mut arguments: Vec<String> = arguments.map(str::to_owned).collect();
    arguments.push(String::new());
    arguments.extend(["--dir".into(), directory.display().to_string()]);
    command("nobody", "/usr/bin/redis-server", &arguments)
}

/// A program of the newest PostgreSQL that is installed.
pub fn postgres_program(name: &str) -> String {
    let root = Path::new("/usr/lib/postgresql");
    let mut versions: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .flatten()
        .map(|entry| entry.path().join("bin").join(name))
        .filter(|program| program.exists())
        .collect();
    versions.sort();
    versions
        .pop()
        .expect("PostgreSQL is installed (scripts/install-deps.sh test)")
        .display()
        .to_string()
}

fn owned_directory(s: &Scenario, name: &str, user: &str) -> PathBuf {
    let directory = s.fresh_path(name);
    std::fs::create_dir(&directory).expect("the scenario's directory can be written");
    run(
        Command::new("chown").arg(user).arg(&directory),
        Duration::from_secs(5),
    )
    .expect_ok();
    directory
}

fn as_user(user: &str, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(privileges(user)).arg(program);
    command.current_dir("/");
    command
}

fn privileges(user: &str) -> [String; 3] {
    // Not init-groups: the few groups of these users are not needed.
    let group = if user == "nobody" { "nogroup" } else { user };
    [
        format!("--reuid={user}"),
        format!("--regid={group}"),
        "--clear-groups".into(),
    ]
}

fn command(user: &str, program: &str, arguments: &[String]) -> Vec<String> {
    let mut words = vec!["setpriv".to_owned()];
    words.extend(privileges(user));
    words.push(program.to_owned());
    words.extend_from_slice(arguments);
    words
}
