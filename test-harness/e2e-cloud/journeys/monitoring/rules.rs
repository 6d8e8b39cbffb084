//! The shipped rules, and the pages of both daemons, before Prometheus' own tool.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e_cloud::{Cluster, Options};

use super::{deploy, has_prometheus};

/// Runs `promtool` beside the shipped files.
fn promtool(arguments: &[&str], input: &str) {
    let mut tool = Command::new("promtool");
    tool.args(arguments).current_dir(deploy()).stdin(Stdio::piped());
    let mut run = tool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("promtool");
    run.stdin.take().expect("its input").write_all(input.as_bytes()).expect("it reads");
    let ended = run.wait_with_output().expect("it ends");
    let reported = [ended.stdout, ended.stderr].concat();
    let reported = String::from_utf8_lossy(&reported);
    assert!(ended.status.success(), "promtool {arguments:?}: {reported}");
}

/// The names of metrics in a text, without what is behind a histogram's.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let ours = words.filter(|word| word.starts_with("llorch_"));
    ours.map(|word| {
        ["_bucket", "_count", "_sum"].iter().fold(word, |w, end| w.strip_suffix(end).unwrap_or(w)).to_owned()
    })
    .collect()
}

// CLOUD-2716
#[test]
fn the_rules_and_their_tests_pass_and_name_only_what_the_daemons_show() {
    if !has_prometheus() {
        return;
    }
    promtool(&["check", "rules", "rules.yml"], "");
    promtool(&["test", "rules", "rules_test.yml"], "");
    promtool(&["check", "config", "--syntax-only", "prometheus.yml"], "");
    let read = |path: &Path| std::fs::read_to_string(path).expect("a file of the tree");
    let (rules, tests) = (read(&deploy().join("rules.yml")), read(&deploy().join("rules_test.yml")));
    let shown = names(&read(&deploy().join("../../contracts/metrics.md")));
    let unknown: Vec<String> =
        names(&rules).union(&names(&tests)).filter(|name| !shown.contains(*name)).cloned().collect();
    assert_eq!(unknown, Vec::<String>::new(), "no daemon shows them");
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 16, "{alerts:?}");
    for alert in alerts {
        let of_it = tests.split("  - name: ").find(|test| test.lines().next() == Some(alert));
        let of_it = of_it.unwrap_or_else(|| panic!("{alert} has no test"));
        assert!(
            of_it.contains("exp_alerts: []") && of_it.contains("- exp_labels:"),
            "{alert}: quiet and not"
        );
    }
}

// CLOUD-2711
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_of_both_daemons_are_as_prometheus_wants_them_and_have_nothing_that_is_not_listed() {
    if !has_prometheus() {
        return;
    }
    let cluster = Cluster::start(Options { nodes: 1, ..Options::default() }).await;
    cluster.client.run(cluster.task(3)).await.check();
    let contract = include_str!("../../../../contracts/metrics.md");
    let (control, node) = contract.split_once("## `pool-managerd`").expect("two parts");
    for (client, part) in [(cluster.client.clone(), control), (cluster.node_client(0), node)] {
        let page = client.get("/metrics").await.unwrap().text().await.unwrap();
        promtool(&["check", "metrics"], &page);
        let listed = names(part);
        for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').expect("a name and a kind");
            if name.starts_with("process_") {
                continue;
            }
            assert!(listed.contains(name), "{name} is not listed");
            let row = part.lines().find(|row| row.starts_with(&format!("| `{name}` |"))).expect("a row");
            assert!(
                row.contains(&format!("| {kind} |")) || row.contains("Until the next release"),
                "{line}: {row}"
            );
        }
    }
}
