//! Tasks and sessions of several holders under the same ids.

use super::*;
use crate::core::reading::{TaskFilter, TaskList, TaskRecord};

fn of(holder: u128, n: u128, digest: u8) -> TaskSpec {
    TaskSpec {
        task_id: TaskId(Uuid::from_u128(n)),
        holder: HolderId(Uuid::from_u128(holder)),
        digest: BodyDigest::new([digest; 32]),
        ..task()
    }
}

impl Bench {
    fn submit_of(&mut self, spec: TaskSpec) -> Result<TaskAccepted, ErrorBody> {
        let reply = self.reply();
        self.apply(Event::Submit { reply, spec: Arc::new(spec) });
        match self.replies[&reply].clone()? {
            Answer::Submitted(accepted) => Ok(accepted),
            other => panic!("{other:?}"),
        }
    }

    fn records(&self) -> Vec<TaskRecord> {
        let mut all: Vec<_> =
            self.core.tasks.in_order().filter_map(|(id, _)| self.core.record(*id)).collect();
        all.sort_by_key(|record| record.number);
        all
    }
}

// CLOUD-2703
// CLOUD-2704
#[test]
fn the_same_task_id_of_two_holders_is_two_tasks_which_a_node_tells_apart() {
    let mut b = Bench::new();
    b.join("a", 3);
    let id = of(1, 5, 0).task_id;
    assert_eq!(b.submit_of(of(1, 5, 1)).unwrap().task_id, id);
    let accepted = b.submit_of(of(2, 5, 2)).unwrap();
    assert_eq!(accepted.task_id, id, "it is called as its holder calls it");
    assert!(accepted.streams.sse.contains(&id.to_string()));
    let [first, second] = [0, 1].map(|n| b.dispatches[n].task);
    assert_eq!(first, id, "whoever comes first goes by its own id");
    assert_ne!(second, id, "nodes and logs know the other by another");
    // Each attaches to its own, and conflicts with its own.
    assert!(b.submit_of(of(1, 5, 1)).is_ok() && b.submit_of(of(2, 5, 2)).is_ok());
    assert_eq!(b.submit_of(of(1, 5, 2)).unwrap_err().code, ErrorCode::TaskConflict);
    let conflict = b.submit_of(of(2, 5, 1)).unwrap_err();
    assert!(conflict.message.contains(&id.to_string()), "{conflict}");
    assert_eq!((b.core.counters().submitted, b.core.counters().attached), (2, 2));
    assert_eq!(b.records().iter().map(|r| r.id).collect::<Vec<_>>(), [id, id]);
    // What is told of them goes under their holders' names for them.
    let reported = b.effects.iter().filter_map(|effect| match effect {
        Effect::Changed { holder, change: ClusterChange::Task { task_id, .. } } => Some((*holder, *task_id)),
        _ => None,
    });
    let reported: BTreeSet<_> = reported.collect();
    let holders = [1, 2].map(|n| (Some(HolderId(Uuid::from_u128(n))), id));
    assert_eq!(reported, BTreeSet::from(holders));
    let explained = b.core.explain_task(at(b.now), second).unwrap();
    assert_eq!(explained.task_id, Some(id));
}

// CLOUD-2703
#[test]
fn a_task_keeps_its_key_when_the_one_that_had_its_id_is_forgotten() {
    let mut b = Bench::new();
    b.core.policy.retained_tasks = 1;
    b.join("a", 4);
    b.submit_of(of(1, 5, 1)).unwrap();
    b.submit_of(of(2, 5, 1)).unwrap();
    let renamed = b.dispatches[1].task;
    b.end(b.dispatches[0].attempt, 1, HowEnded::Finished);
    b.submit_of(of(1, 6, 1)).unwrap();
    b.end(b.dispatches[2].attempt, 1, HowEnded::Finished);
    assert!(b.view(of(1, 5, 1).task_id).is_none(), "it made room");
    b.submit_of(of(2, 5, 1)).unwrap();
    assert_eq!((b.dispatches.len(), b.core.counters().attached), (3, 1));
    // The id is free for another, and the renamed one is still found.
    b.submit_of(of(3, 5, 1)).unwrap();
    assert_eq!(b.dispatches[3].task, of(3, 5, 1).task_id);
    b.submit_of(of(2, 5, 1)).unwrap();
    assert_eq!(b.core.counters().attached, 2);
    let reply = b.reply();
    b.apply(Event::Cancel { reply, task_id: renamed });
    b.end(b.dispatches[1].attempt, 0, HowEnded::Closed);
    assert_eq!(b.terminal, BTreeMap::from([(renamed, ErrorCode::Canceled)]));
}

// CLOUD-2704
#[test]
fn a_key_that_a_client_has_guessed_is_given_to_nobody_else() {
    let mut b = Bench::new();
    b.core.policy.admission_capacity = 100;
    b.join("a", 8);
    b.submit_of(of(1, 5, 1)).unwrap();
    // The ids that the core draws next, by whoever knows how it draws them.
    let drawn = |n: u64| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&7_u64.to_be_bytes());
        bytes[8..].copy_from_slice(&n.to_be_bytes());
        Uuid::new_v8(bytes)
    };
    for n in 60..90 {
        b.submit_of(TaskSpec { task_id: TaskId(drawn(n)), ..of(1, 0, 1) }).unwrap();
    }
    assert!((60..90).contains(&(b.core.ids_given + 1)), "the next one is among them");
    b.submit_of(of(2, 5, 2)).unwrap();
    let records = b.records();
    let keys: BTreeSet<TaskId> = records.iter().map(|record| record.key).collect();
    assert_eq!(keys.len(), records.len());
    assert_eq!(records.last().map(|record| record.id), Some(of(2, 5, 2).task_id));
}

// CLOUD-2707
#[test]
fn a_list_shows_the_tasks_of_one_holder_or_of_all_with_whose_they_are() {
    let mut b = Bench::new();
    b.core.policy.admission_capacity = 100;
    b.join("a", 1);
    for (holder, n) in [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)] {
        b.submit_of(of(holder, n, 1)).unwrap();
    }
    let list = TaskList(b.records().into_iter().map(Arc::new).collect());
    let own = TaskFilter { holder: Some(HolderId(Uuid::from_u128(1))), ..TaskFilter::default() };
    let page = list.page(at(b.now), &own, u64::MAX, 2, |_| None);
    let ids = |page: &TaskPage| page.tasks.iter().map(|t| t.task_id.0.as_u128()).collect::<Vec<_>>();
    assert_eq!((ids(&page), page.next), (vec![3, 2], Some(of(1, 2, 1).task_id)));
    assert!(page.tasks.iter().all(|task| task.holder.is_none()));
    let all = list.page(at(b.now), &TaskFilter::default(), u64::MAX, 4, |holder| Some(holder.to_string()));
    assert_eq!(ids(&all), [3, 2, 2, 1]);
    let last = &list.0[1];
    assert_eq!(all.next, Some(last.key), "the next page begins at one task, whoever else has its id");
    assert_ne!(last.key, last.id);
    assert_eq!(all.tasks[1].holder, Some(HolderId(Uuid::from_u128(2)).to_string()));
}
