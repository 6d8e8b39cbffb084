//! The names of nodes, resolved on threads that nothing else blocks.
//!
//! A runtime lends threads to everything that blocks. Those of a thread for streams serve the names of
//! its links, and through here those of probes too: work on a disk, which clients may ask for in any
//! number, has the others.

use std::net::{SocketAddr, ToSocketAddrs};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::runtime::Handle;

/// Resolves on the threads of this runtime.
#[derive(Debug, Clone)]
pub(super) struct NodeNames(pub(super) Handle);

impl Resolve for NodeNames {
    fn resolve(&self, name: Name) -> Resolving {
        let runtime = self.0.clone();
        Box::pin(async move {
            let look = move || (name.as_str(), 0).to_socket_addrs().map(Iterator::collect);
            let found: Vec<SocketAddr> =
                owned_tasks::blocking_on(&runtime, "resolution of a name", look).await??;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use owned_tasks::StreamThreads;
    use tokio::runtime::Builder;

    use super::*;

    // CLOUD-2759
    #[test]
    fn names_are_resolved_while_all_threads_for_the_disk_are_taken() {
        let threads = StreamThreads::start(1).unwrap();
        let busy = Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).enable_all().build();
        let busy = busy.unwrap();
        let (free, taken) = std::sync::mpsc::channel::<()>();
        let disk = busy.spawn_blocking(move || taken.recv());
        let names = NodeNames(threads.first().handle().clone());
        let found = busy.block_on(names.resolve("localhost".parse().unwrap())).unwrap();
        assert!(found.into_iter().all(|addr| addr.ip().is_loopback()));
        free.send(()).unwrap();
        busy.block_on(disk).unwrap().unwrap();
    }
}
