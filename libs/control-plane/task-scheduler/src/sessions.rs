//! Sessions: tasks that belong together, by what they may still use and where they are warm.
//!
//! A session is made by its first task and forgotten when nobody used it for its time to live.
//! It holds numbers and a place, never content. Turns and tokens are held for a task when it is
//! admitted and accounted when it ends, so that tasks side by side cannot overdraw them; the time
//! of running is looked at when a task is admitted. A token event counts as one token.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_registry_types::moment::millis;
use pool_registry_types::task::SessionView;
use pool_registry_types::{ErrorBody, ErrorCode, Moment, NodeId, PoolKey, ReplicaId, SessionKey, TaskId};

/// Most sessions at a time; beyond, the one that was not used for the longest time goes.
const MAX_SESSIONS: usize = 10_000;

/// What an operator allows each session.
#[derive(Debug, Clone, Copy)]
pub struct SessionPolicy {
    /// How long it lives without being used.
    pub ttl: Duration,
    pub max_turns: u32,
    /// Tokens of all answers together.
    pub token_budget: Option<u64>,
    /// Time of running of all tasks together.
    pub time_budget: Option<Duration>,
}

/// Where the session's context is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionReplica {
    pub(crate) pool: PoolKey,
    pub(crate) replica: ReplicaId,
    /// Nothing is known to have emptied its cache.
    pub(crate) warm: bool,
}

#[derive(Debug, Default)]
struct Open {
    /// Tokens that the task may still use.
    held: u64,
    /// Where it runs now.
    node: Option<NodeId>,
}

#[derive(Debug)]
struct Session {
    last_used: Moment,
    turns: u32,
    tokens_used: u64,
    time_used: Duration,
    /// Its tasks that have not ended.
    open: BTreeMap<TaskId, Open>,
    last: Option<SessionReplica>,
}

impl Session {
    fn new(now: Moment) -> Self {
        Self {
            last_used: now,
            turns: 0,
            tokens_used: 0,
            time_used: Duration::ZERO,
            open: BTreeMap::new(),
            last: None,
        }
    }

    fn tokens_left(&self, policy: &SessionPolicy) -> Option<u64> {
        let held: u64 = self.open.values().map(|open| open.held).fold(0, u64::saturating_add);
        policy.token_budget.map(|budget| budget.saturating_sub(self.tokens_used).saturating_sub(held))
    }

    fn time_left(&self, policy: &SessionPolicy) -> Option<Duration> {
        policy.time_budget.map(|budget| budget.saturating_sub(self.time_used))
    }
}

/// All sessions.
#[derive(Debug)]
pub(crate) struct Sessions {
    policy: SessionPolicy,
    sessions: BTreeMap<SessionKey, Session>,
    /// Sessions without an open task, by when they were used last.
    idle: BTreeSet<(Moment, SessionKey)>,
    /// Sessions by the pool where they are warm.
    warm_at: BTreeMap<PoolKey, BTreeSet<SessionKey>>,
    /// What has come, gone or changed since [`Sessions::take_changed`].
    changed: BTreeSet<SessionKey>,
}

impl Sessions {
    pub(crate) fn new(policy: SessionPolicy) -> Self {
        Self {
            policy,
            sessions: BTreeMap::new(),
            idle: BTreeSet::new(),
            warm_at: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// The sessions that have come, gone or changed since the last time.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<SessionKey> {
        std::mem::take(&mut self.changed)
    }

    /// Takes a task into its session, which is made if need be. Returns how many tokens the
    /// task may use, where they are limited. Errors: `BUDGET_EXCEEDED` and `OVERLOADED`.
    pub(crate) fn admit(
        &mut self,
        now: Moment,
        id: SessionKey,
        task: TaskId,
        max_tokens: Option<u32>,
    ) -> Result<Option<u64>, ErrorBody> {
        let policy = self.policy;
        let exceeded = |what: String| {
            let message = format!("session {}: {what}; delete it, or start another", id.session_id);
            Err(ErrorBody::new(ErrorCode::BudgetExceeded, message))
        };
        let asked = max_tokens.map(u64::from);
        // A session that is refused its first task is never made.
        let fresh = Session::new(now);
        let session = self.sessions.get(&id).unwrap_or(&fresh);
        let left = session.tokens_left(&policy);
        if session.turns >= policy.max_turns {
            return exceeded(format!("all of its {} turns are used", policy.max_turns));
        }
        if let Some(left) = left
            && asked.unwrap_or(1) > left
        {
            return exceeded(format!("{left} tokens are left of its budget"));
        }
        if session.time_left(&policy).is_some_and(|left| left.is_zero()) {
            return exceeded("its time of running is used up".into());
        }
        if !self.sessions.contains_key(&id) {
            self.make_room()?;
        }
        self.changed.insert(id);
        let session = self.sessions.entry(id).or_insert(fresh);
        self.idle.remove(&(session.last_used, id));
        session.last_used = now;
        session.turns += 1;
        let allowed = left.map(|left| asked.unwrap_or(left));
        session.open.insert(task, Open { held: allowed.unwrap_or(0), node: None });
        Ok(allowed)
    }

    /// Takes a task into its session for the sake of where that is warm: nothing is held of its budgets,
    /// no turn is counted, and where there is no room for another session the task goes without: a
    /// preference is worth none of another caller's sessions.
    pub(crate) fn join(&mut self, now: Moment, id: SessionKey, task: TaskId) {
        if !self.sessions.contains_key(&id) && !self.make_room_of(&id) {
            return;
        }
        self.changed.insert(id);
        let session = self.sessions.entry(id).or_insert_with(|| Session::new(now));
        self.idle.remove(&(session.last_used, id));
        session.last_used = now;
        session.open.insert(task, Open::default());
    }

    /// Room for another session of this caller, for which one of its own goes at most.
    fn make_room_of(&mut self, id: &SessionKey) -> bool {
        if self.sessions.len() < MAX_SESSIONS {
            return true;
        }
        let own = self.idle.iter().find(|(_, idle)| idle.holder == id.holder).copied();
        let Some(oldest) = own else { return false };
        self.idle.remove(&oldest);
        self.forget(oldest.1);
        true
    }

    fn make_room(&mut self) -> Result<(), ErrorBody> {
        if self.sessions.len() < MAX_SESSIONS {
            return Ok(());
        }
        let message = format!("{MAX_SESSIONS} sessions have open tasks, which is the most");
        let (_, oldest) =
            self.idle.pop_first().ok_or_else(|| ErrorBody::new(ErrorCode::Overloaded, message))?;
        self.forget(oldest);
        Ok(())
    }

    /// The task runs on a node, or has stopped running on one.
    pub(crate) fn runs_on(&mut self, id: SessionKey, task: TaskId, node: Option<NodeId>) {
        if let Some(open) = self.sessions.get_mut(&id).and_then(|session| session.open.get_mut(&task)) {
            open.node = node;
        }
    }

    /// The first token of a task came from there: the context is there now.
    pub(crate) fn record_replica(&mut self, id: SessionKey, task: TaskId, pool: PoolKey, replica: ReplicaId) {
        if let Some(session) = self.sessions.get_mut(&id).filter(|session| session.open.contains_key(&task)) {
            self.warm_at.entry(pool.clone()).or_default().insert(id);
            let before = session.last.replace(SessionReplica { pool, replica, warm: true });
            let now_at = session.last.as_ref().map(|last| &last.pool);
            let left = before.filter(|before| now_at != Some(&before.pool));
            left.into_iter().for_each(|left| self.leaves(id, &left.pool));
            self.changed.insert(id);
        }
    }

    /// The task is over: what it used is used.
    pub(crate) fn ended(&mut self, now: Moment, id: SessionKey, task: TaskId, tokens: u64, took: Duration) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        // A session that was deleted and made anew owes nothing to the tasks of the old one.
        if session.open.remove(&task).is_none() {
            return;
        }
        session.tokens_used = session.tokens_used.saturating_add(tokens);
        session.time_used = session.time_used.saturating_add(took);
        session.last_used = now;
        if session.open.is_empty() {
            self.idle.insert((now, id));
        }
        self.changed.insert(id);
    }

    /// Only these replicas of the pool have been there all the time: nothing else there is warm.
    pub(crate) fn cooled(&mut self, pool: &PoolKey, but: &[ReplicaId]) {
        let Some(warm) = self.warm_at.get(pool) else { return };
        let sessions = &mut self.sessions;
        let mut stays = |id: &SessionKey| {
            let last = sessions.get_mut(id).and_then(|session| session.last.as_mut());
            last.is_some_and(|last| {
                last.warm = but.contains(&last.replica);
                last.warm
            })
        };
        let cooled: Vec<SessionKey> = warm.iter().filter(|id| !stays(id)).copied().collect();
        for id in cooled {
            self.leaves(id, pool);
            self.changed.insert(id);
        }
    }

    /// The session is not warm there any more.
    fn leaves(&mut self, id: SessionKey, pool: &PoolKey) {
        if let Some(warm) = self.warm_at.get_mut(pool) {
            warm.remove(&id);
            if warm.is_empty() {
                self.warm_at.remove(pool);
            }
        }
    }

    fn forget(&mut self, id: SessionKey) -> Option<Session> {
        let session = self.sessions.remove(&id)?;
        if let Some(last) = &session.last {
            self.leaves(id, &last.pool);
        }
        self.changed.insert(id);
        Some(session)
    }

    /// Where the session's context is, while it is warm.
    pub(crate) fn warm_replica(&self, id: SessionKey) -> Option<&SessionReplica> {
        self.sessions.get(&id)?.last.as_ref().filter(|last| last.warm)
    }

    /// The nodes on which its tasks run now, one entry a task.
    pub(crate) fn running_on(&self, id: SessionKey) -> impl Iterator<Item = &NodeId> {
        let open = self.sessions.get(&id).into_iter().flat_map(|session| session.open.values());
        open.filter_map(|open| open.node.as_ref())
    }

    pub(crate) fn tokens_left(&self, id: SessionKey) -> Option<u64> {
        self.sessions.get(&id)?.tokens_left(&self.policy)
    }

    /// Forgets a session. Its tasks go on.
    pub(crate) fn delete(&mut self, id: SessionKey) -> bool {
        let session = self.forget(id);
        if let Some(session) = &session {
            self.idle.remove(&(session.last_used, id));
        }
        session.is_some()
    }

    pub(crate) fn expire(&mut self, now: Moment) {
        while let Some((used, id)) = self.idle.first().copied()
            && used + self.policy.ttl <= now
        {
            self.idle.pop_first();
            self.forget(id);
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        self.idle.first().map(|(used, _)| *used + self.policy.ttl)
    }

    pub(crate) fn is_idle(&self, id: SessionKey) -> bool {
        self.sessions.get(&id).is_some_and(|session| session.open.is_empty())
    }

    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn view(&self, now: Moment, id: SessionKey) -> Option<SessionView> {
        let session = self.sessions.get(&id)?;
        let last = session.last.as_ref();
        let ttl = if session.open.is_empty() {
            (session.last_used + self.policy.ttl).since(now)
        } else {
            self.policy.ttl
        };
        Some(SessionView {
            session_id: id.session_id,
            ttl_ms: millis(ttl),
            turns: session.turns,
            turns_max: self.policy.max_turns,
            tokens_used: session.tokens_used,
            tokens_budget_remaining: session.tokens_left(&self.policy),
            time_budget_remaining_ms: session.time_left(&self.policy).map(millis),
            kv_warmth: last.is_some_and(|last| last.warm),
            node_id: last.map(|last| last.pool.node_id.clone()),
            pool_id: last.map(|last| last.pool.pool_id.clone()),
            replica_id: last.map(|last| last.replica.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::{HolderId, PoolId, SessionId};
    use uuid::Uuid;

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::from_millis(seconds * 1_000)
    }

    fn id(n: u128) -> SessionKey {
        SessionKey { holder: HolderId::OPEN, session_id: SessionId(Uuid::from_u128(n)) }
    }

    fn task(n: u128) -> TaskId {
        TaskId(Uuid::from_u128(n))
    }

    fn sessions() -> Sessions {
        Sessions::new(SessionPolicy {
            ttl: Duration::from_secs(600),
            max_turns: 3,
            token_budget: Some(100),
            time_budget: Some(Duration::from_secs(60)),
        })
    }

    fn code(result: Result<Option<u64>, ErrorBody>) -> Option<ErrorCode> {
        result.err().map(|error| error.code)
    }

    const EXCEEDED: Option<ErrorCode> = Some(ErrorCode::BudgetExceeded);

    // CLOUD-1740
    #[test]
    fn turns_are_counted_at_admission() {
        let mut s = sessions();
        for n in 0..3 {
            assert_eq!(code(s.admit(at(0), id(1), task(n), Some(1))), None);
        }
        assert_eq!(code(s.admit(at(0), id(1), task(3), Some(1))), EXCEEDED);
        assert_eq!(code(s.admit(at(0), id(2), task(4), Some(1))), None, "another session has its own");
        assert_eq!(code(s.admit(at(0), id(3), task(5), Some(101))), EXCEEDED);
        assert_eq!((s.len(), s.view(at(0), id(3))), (2, None), "what was refused leaves nothing behind");
    }

    // CLOUD-2705
    #[test]
    fn sessions_of_one_id_and_two_holders_have_their_own_turns_places_and_ends() {
        let mut s = sessions();
        let other = SessionKey { holder: HolderId(Uuid::from_u128(1)), ..id(1) };
        for n in 0..3 {
            s.admit(at(0), id(1), task(n), Some(1)).unwrap();
        }
        assert_eq!(s.admit(at(0), other, task(3), Some(1)).err(), None);
        let refused = s.admit(at(0), id(1), task(4), Some(1)).unwrap_err();
        assert!(refused.message.contains(&id(1).session_id.to_string()), "{refused}");
        assert_eq!(s.view(at(0), other).map(|view| view.turns), Some(1));
        assert!(s.delete(other));
        assert_eq!(
            s.view(at(0), id(1)).map(|view| (view.turns, view.session_id)),
            Some((3, id(1).session_id))
        );
    }

    // CLOUD-2853
    #[test]
    fn a_session_that_is_joined_takes_the_place_of_one_of_its_caller_and_of_nobody_else() {
        let mut s = sessions();
        let of = |holder: u128, n: u128| SessionKey { holder: HolderId(Uuid::from_u128(holder)), ..id(n) };
        for n in 0..MAX_SESSIONS as u128 {
            s.join(at(0), of(1, n), task(n));
            s.ended(at(1), of(1, n), task(n), 1, Duration::ZERO);
        }
        let (joined, others) = (task(100_000), task(100_001));
        s.join(at(2), of(2, 0), joined);
        assert_eq!((s.len(), s.view(at(2), of(2, 0))), (MAX_SESSIONS, None), "it goes without");
        s.ended(at(3), of(2, 0), joined, 1, Duration::ZERO);
        s.join(at(4), of(1, 100_000), others);
        assert!(s.view(at(4), of(1, 100_000)).is_some());
        assert_eq!((s.len(), s.view(at(4), of(1, 0))), (MAX_SESSIONS, None), "its own oldest went");
    }

    // CLOUD-1741
    #[test]
    fn tasks_side_by_side_cannot_overdraw_the_tokens() {
        let mut s = sessions();
        assert_eq!(s.admit(at(0), id(1), task(1), Some(60)), Ok(Some(60)));
        assert_eq!(code(s.admit(at(0), id(1), task(2), Some(60))), EXCEEDED);
        s.ended(at(1), id(1), task(1), 10, Duration::from_secs(1));
        assert_eq!(s.tokens_left(id(1)), Some(90));
        assert_eq!(
            s.admit(at(1), id(1), task(2), None),
            Ok(Some(90)),
            "without a bound it gets what is left"
        );
        assert_eq!(code(s.admit(at(1), id(1), task(3), None)), EXCEEDED);
    }

    // CLOUD-1741
    #[test]
    fn the_time_of_running_is_limited() {
        let mut s = sessions();
        s.admit(at(0), id(1), task(1), Some(1)).unwrap();
        s.ended(at(60), id(1), task(1), 1, Duration::from_secs(60));
        assert_eq!(code(s.admit(at(60), id(1), task(2), Some(1))), EXCEEDED);
    }

    // CLOUD-1742
    #[test]
    fn an_unused_session_is_forgotten_and_one_with_an_open_task_is_not() {
        let mut s = sessions();
        s.admit(at(0), id(1), task(1), Some(1)).unwrap();
        s.expire(at(10_000));
        assert!(s.view(at(10_000), id(1)).is_some());
        s.ended(at(10_000), id(1), task(1), 1, Duration::ZERO);
        assert_eq!(s.next_deadline(), Some(at(10_600)));
        s.expire(at(10_599));
        assert_eq!(s.view(at(10_599), id(1)).unwrap().ttl_ms, 1_000);
        s.expire(at(10_600));
        assert_eq!(s.view(at(10_600), id(1)), None);
    }

    // CLOUD-1743
    #[test]
    fn a_session_made_anew_owes_nothing_to_the_tasks_of_the_old_one() {
        let mut s = sessions();
        s.admit(at(0), id(1), task(1), Some(50)).unwrap();
        assert!(s.delete(id(1)) && !s.delete(id(1)));
        s.admit(at(1), id(1), task(2), Some(100)).unwrap();
        s.ended(at(2), id(1), task(1), 50, Duration::from_secs(60));
        assert_eq!(s.view(at(2), id(1)).map(|view| (view.turns, view.tokens_used)), Some((1, 0)));
    }

    // CLOUD-1744
    #[test]
    fn a_place_is_warm_until_its_pool_cooled() {
        let mut s = sessions();
        let pool = |n: &str| PoolKey::new(NodeId::new(n).unwrap(), PoolId::new("p").unwrap());
        s.admit(at(0), id(1), task(1), Some(1)).unwrap();
        s.record_replica(id(1), task(1), pool("a"), ReplicaId::new("r0").unwrap());
        s.cooled(&pool("b"), &[]);
        s.cooled(&pool("a"), &[ReplicaId::new("r0").unwrap()]);
        assert_eq!(s.warm_replica(id(1)).map(|last| &last.pool), Some(&pool("a")));
        s.cooled(&pool("a"), &[ReplicaId::new("r1").unwrap()]);
        assert_eq!(s.warm_replica(id(1)), None);
        assert_eq!(s.view(at(0), id(1)).unwrap().node_id, Some(NodeId::new("a").unwrap()));
    }
}
