//! A daemon of the commit before the link beside one of today, both ways round.

use std::time::Duration;

use e2e_cloud::{Cluster, Options, eventually, old};
use pool_registry_types::view::LinkState;

async fn serves(cluster: &Cluster) {
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (client, task) = (cluster.client.clone(), cluster.task(10));
            tokio::spawn(async move { client.run(task).await })
        })
        .collect();
    let whole: String = (0..10).map(|n| format!("w{n} ")).collect();
    for task in tasks {
        let transcript = task.await.expect("a client does not panic");
        transcript.check();
        assert!(transcript.completed(), "{:?}", transcript.events.last());
        assert_eq!((transcript.text(), transcript.starts()), (whole.clone(), 1));
    }
}

// CLOUD-2678
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_commit_before_the_link_is_served_call_by_call_and_shown_so() {
    let Some(node_program) = old::program("pool-managerd") else { return };
    let cluster = Cluster::start(Options { node_program: Some(node_program), ..Options::default() }).await;
    serves(&cluster).await;
    for node in cluster.client.nodes().await {
        let link = node.link.expect("how its link stands is shown");
        assert_eq!(link.state, LinkState::None, "{link:?}");
        assert!(link.reason.is_some_and(|reason| reason.contains("does not say that it speaks it")));
    }
    let page = cluster.client.get("/metrics").await.expect("an answer").text().await.expect("text");
    assert!(!page.contains("llorch_links{"), "it has no link:\n{page}");
}

// CLOUD-2678
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_of_the_commit_before_the_link_is_served_by_a_node_of_today() {
    let Some(control_program) = old::program("orchestratord") else { return };
    let mut cluster =
        Cluster::start(Options { control_program: Some(control_program), ..Options::default() }).await;
    serves(&cluster).await;
    assert!(cluster.client.nodes().await.iter().all(|node| node.link.is_none()));
    // Updated, it takes the same nodes' links.
    cluster.control.as_mut().expect("a running daemon").kill();
    cluster.options.control_program = None;
    cluster.start_control();
    for n in 0..2 {
        cluster.wait_online(n).await;
    }
    eventually("the links are up", Duration::from_secs(5), || async {
        let nodes = cluster.client.nodes().await;
        let up = |link: Option<LinkState>| link == Some(LinkState::Up);
        nodes.iter().all(|node| up(node.link.as_ref().map(|link| link.state))).then_some(())
    })
    .await;
    serves(&cluster).await;
}
