//! What images and Compose files of `deploy/compose` rely on and that needs no container: health checks by the
//! daemons themselves, and the secrets. The stack itself is `cargo xtask compose:test`.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use e2e_cloud::process::program;

use crate::security::Pki;

/// What a container's health check does, with the variables of its daemon.
fn health(daemon: &str, variables: &[(&str, String)], flags: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(program(daemon));
    // No daemon is asked through a proxy.
    command.env("http_proxy", "http://127.0.0.1:1").env("https_proxy", "http://127.0.0.1:1");
    let Output { status, stdout, stderr } = command
        .envs(variables.iter().map(|(name, value)| (*name, value.as_str())))
        .arg("health")
        .args(flags)
        .output()
        .expect("it runs");
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

// CLOUD-2782
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_health_check_tells_a_daemon_that_lives_over_tls_too() {
    let pki = Pki::new();
    let mut cluster = pki.cluster();
    // Its certificate names no address: health checks ask by one all the same.
    let own = pki.leaf("node", &pki.ca, "gpu-node-1", test_certs::Validity::Now);
    let node = pki.variables("POOL_MANAGERD", own);
    cluster.options.node = node.iter().map(|(name, value)| (0, *name, value.clone())).collect();
    cluster.add_node(0);
    cluster.wait_online(0).await;
    let control = [
        ("ORCHESTRATORD_ADDR", format!("0.0.0.0:{}", cluster.port)),
        ("ORCHESTRATORD_TLS_CERT", pki.path("orchestratord.pem")),
    ];
    let node = [
        ("POOL_MANAGERD_ADDR", format!("127.0.0.1:{}", cluster.nodes[0].port)),
        ("POOL_MANAGERD_TLS_CERT", pki.path("node.pem")),
    ];
    let (status, text) = health("orchestratord", &control, &[]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains(&format!("https://127.0.0.1:{}/health/live answers", cluster.port)), "{text}");
    assert_eq!(health("pool-managerd", &node, &[]).0, Some(0));
    // A node that has lost its control plane lives.
    cluster.control.as_mut().expect("it runs").kill();
    assert_eq!(health("pool-managerd", &node, &[]).0, Some(0));
    let (status, text) = health("orchestratord", &control, &[]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("does not answer") && text.contains("refused"), "{text}");
    // Plain HTTP to a port that speaks TLS is no answer that counts.
    let (status, text) = health("pool-managerd", &node[..1], &[]);
    assert!(status == Some(1) && text.contains("answers 400"), "{text}");
}

// CLOUD-2782
#[test]
fn a_daemon_that_takes_connections_and_does_not_answer_is_not_healthy() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address").to_string();
    let start = Instant::now();
    let (status, text) = health("pool-managerd", &[("POOL_MANAGERD_ADDR", addr)], &["--timeout-secs", "1"]);
    assert!(status == Some(1) && text.contains("does not answer"), "{text}");
    assert!(start.elapsed() >= Duration::from_secs(1));
}

fn make_secrets(folder: &Path) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/compose/make-secrets");
    Command::new(script).arg(folder).output().expect("a shell")
}

// CLOUD-2783
#[test]
fn the_secrets_of_compose_are_made_once_and_both_daemons_take_them() {
    use std::os::unix::fs::PermissionsExt;
    let parent = tempfile::tempdir().expect("a folder");
    let folder: PathBuf = parent.path().join("secrets");
    assert!(make_secrets(&folder).status.success());
    let mode =
        |name: &str| std::fs::metadata(folder.join(name)).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode("."), mode("tokens")), (0o700, 0o644), "of the host's users only its own looks in");
    let checked = |name: &str| {
        let mut check = Command::new(program("orchestratord"));
        let output = check.args(["token", "check"]).arg(folder.join(name)).output().expect("it runs");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = checked("node-tokens");
    assert!(text.contains("cluster node,control") && text.contains("prometheus metrics"), "{text}");
    assert!(!text.contains("admin") && !text.contains("client"), "no node may do what they may: {text}");
    let text = checked("tokens");
    for holder in ["cluster node,control", "client client", "prometheus metrics", "admin admin"] {
        assert!(text.contains(holder), "{text}");
    }
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("it is there");
    let tokens = read("tokens");
    for name in ["client-token", "metrics-token", "admin-token"] {
        assert!(read(name).len() == 64 && tokens.contains(&read(name)), "{name}");
    }
    let again = make_secrets(&folder);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("is not empty"));
    assert_eq!(read("tokens"), tokens);
}
