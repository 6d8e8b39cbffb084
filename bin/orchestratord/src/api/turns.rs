//! Who makes a list when.
//!
//! What is made for one request may be long: a list of all nodes has megabytes where one of them says so. So
//! each holder has one such answer made at a time, and whoever asks for many of them waits for its own, while
//! others are answered after one of each holder at most.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use daemon_kit::Caller;
use parking_lot::Mutex;
use pool_registry_types::HolderId;
use tokio::sync::Mutex as Turn;

/// Holders that are remembered before those of whom nobody waits are forgotten.
const MANY: usize = 64;

/// The turns of all holders.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns(Arc<Mutex<HashMap<HolderId, Arc<Turn<()>>>>>);

impl Turns {
    fn of(&self, holder: HolderId) -> Arc<Turn<()>> {
        let mut turns = self.0.lock();
        if turns.len() > MANY {
            // Who waits, or is answered, has it too.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        Arc::clone(turns.entry(holder).or_default())
    }
}

/// Answers the request in its holder's turn; first come, first served.
pub(crate) async fn in_turn(State(turns): State<Turns>, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let turn = turns.of(caller.holder_id());
    let _turn = turn.lock().await;
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::future::join_all;
    use tokio::time::{Instant, sleep};
    use uuid::Uuid;

    use super::*;

    // CLOUD-2969
    #[tokio::test(start_paused = true)]
    async fn each_holder_has_one_list_made_at_a_time_and_others_do_not_wait_for_all_of_them() {
        let (turns, start) = (Turns::default(), Instant::now());
        let make = |holder: u128| {
            let turns = turns.clone();
            async move {
                let turn = turns.of(HolderId(Uuid::from_u128(holder)));
                let _turn = turn.lock().await;
                sleep(Duration::from_secs(1)).await;
                start.elapsed().as_secs()
            }
        };
        let took = join_all((0..10).map(|_| make(1)).chain([make(2)])).await;
        assert_eq!(took, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1]);
        // Whoever goes away while it waits gives its turn on.
        let mut waiting = [1, 1, 1].map(|holder| tokio::spawn(make(holder)));
        tokio::task::yield_now().await;
        waiting[1].abort();
        let mut took = Vec::new();
        for ended in &mut waiting {
            took.push(ended.await.ok());
        }
        assert_eq!(took, [Some(11), None, Some(12)]);
        for holder in 0..200 {
            drop(turns.of(HolderId(Uuid::from_u128(holder))));
        }
        assert!(turns.0.lock().len() <= MANY + 1);
    }
}
