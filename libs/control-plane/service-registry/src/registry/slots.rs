//! Claims on slots, and what keeps a pool from getting any.

use super::*;

impl ServiceRegistry {
    /// Claims a slot of a pool for an attempt. The caller has checked that one is free.
    pub fn reserve(&mut self, pool: &PoolKey, attempt: AttemptId) {
        let claim = Reservation { pool_id: pool.pool_id.clone(), accepted_after: None };
        let of_known = claim.clone();
        let known = self.nodes.change_claims(&pool.node_id, |node| {
            node.breaker.sent(attempt);
            if let Some(book) = node.pools.get_mut(&pool.pool_id) {
                book.reserved.insert(attempt);
                book.breaker.sent(attempt);
            }
            let before = node.claims.insert(attempt, of_known);
            assert!(before.is_none(), "attempt {attempt} reserved twice");
        });
        if known.is_none() {
            self.reservations.insert(pool, attempt, claim);
        }
        self.reservations.all += 1;
    }

    /// The node took the attempt on the pool after having made the report of this number.
    pub fn accepted(&mut self, pool: &PoolKey, attempt: &AttemptId, accepted_after: u64) {
        let known = self.nodes.change_claims(&pool.node_id, |node| {
            if let Some(claim) = node.claims.get_mut(attempt) {
                claim.accepted_after = Some(accepted_after);
                node.evidence.took_attempt();
            }
        });
        if known.is_none()
            && let Some(claim) = self.reservations.get_mut(&pool.node_id, attempt)
        {
            claim.accepted_after = Some(accepted_after);
        }
    }

    /// Gives a claim on a slot of the pool back. `final_report` is the final report number, when it
    /// came: that of its last report before the attempt ended. Returns whether there was a claim:
    /// releasing twice has no effect.
    pub fn release(&mut self, pool: &PoolKey, attempt: &AttemptId, final_report: Option<u64>) -> bool {
        let released = self.nodes.change_claims(&pool.node_id, |node| {
            if node.claims.remove(attempt).is_none() {
                return false;
            }
            node.breaker.over(attempt);
            if let Some(book) = node.pools.get_mut(&pool.pool_id) {
                book.reserved.remove(attempt);
                book.breaker.over(attempt);
                if final_report.is_some() {
                    book.reported.remove(attempt);
                }
            }
            if let Some(final_report) = final_report {
                node.closed.insert(*attempt, final_report);
            }
            true
        });
        let released = released.unwrap_or_else(|| self.reservations.remove(&pool.node_id, attempt).is_some());
        self.reservations.all -= usize::from(released);
        released
    }

    /// The pool refused a dispatch: it counts as full until its next report or `until`.
    pub fn hold(&mut self, pool: &PoolKey, until: Moment) {
        if self.change_pool(pool, |book| book.held_until = Some(until)).is_some() {
            self.pool_alarms.insert((until, pool.clone()));
        }
    }

    pub(super) fn change_pool<T>(
        &mut self,
        pool: &PoolKey,
        change: impl FnOnce(&mut PoolBook) -> T,
    ) -> Option<T> {
        self.nodes.change(&pool.node_id, |node| node.pools.get_mut(&pool.pool_id).map(change))?
    }

    // ---- breakers ----

    /// The attempt got through to its engine: neither its pool nor its node has anything wrong.
    /// Returns whether a breaker of either was open.
    pub fn proven(&mut self, pool: &PoolKey) -> bool {
        let Some(node) = self.nodes.get(&pool.node_id) else { return false };
        if node.breaker.is_well() && node.pools.get(&pool.pool_id).is_none_or(|book| book.breaker.is_well()) {
            return false;
        }
        let was_open = self.nodes.change(&pool.node_id, |node| {
            let mut was_open = node.breaker.blocks();
            node.breaker.succeeded();
            if let Some(book) = node.pools.get_mut(&pool.pool_id) {
                was_open |= book.breaker.blocks();
                book.breaker.succeeded();
            }
            was_open
        });
        was_open.unwrap_or(false)
    }

    /// The engine of the pool failed the attempt with an error of its own. To be told before
    /// the attempt is released. Returns whether this tripped the pool.
    pub fn pool_failed(
        &mut self,
        now: Moment,
        pool: &PoolKey,
        attempt: &AttemptId,
        task: TaskId,
        dispatched: Moment,
    ) -> bool {
        if !self.enforces(Rule::Breakers) {
            return false;
        }
        let task = Some(task).filter(|_| self.enforces(Rule::TaskCountsOnce));
        let until =
            self.change_pool(pool, |book| book.breaker.failed(now, attempt, task, dispatched)).flatten();
        until.is_some_and(|until| self.pool_alarms.insert((until, pool.clone())))
    }

    /// What the task had counted against the pool was the request's own fault. Returns whether the
    /// pool takes tasks again by that.
    pub fn pool_absolved(&mut self, pool: &PoolKey, task: TaskId) -> bool {
        self.change_pool(pool, |book| book.breaker.withdraw(task)).unwrap_or(false)
    }

    /// The stream of the attempt broke. Returns whether this
    /// tripped the node, which concerns all of its pools.
    pub fn stream_failed(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        attempt: &AttemptId,
        dispatched: Moment,
    ) -> bool {
        if !self.enforces(Rule::Breakers) {
            return false;
        }
        let until = self.nodes.change(node_id, |node| node.breaker.failed(now, attempt, None, dispatched));
        until.flatten().is_some()
    }

    /// A stream of the node came to a whole end, whatever that was.
    pub fn stream_well(&mut self, node_id: &NodeId) {
        self.nodes.change(node_id, |node| node.breaker.succeeded());
    }
}
