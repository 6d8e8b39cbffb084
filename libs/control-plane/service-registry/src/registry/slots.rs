//! Claims on slots, and what keeps a pool from getting any.

use super::*;

impl ServiceRegistry {
    /// Claims a slot of a pool for an attempt. The caller has checked that one is free.
    pub fn reserve(&mut self, pool: &PoolKey, attempt: AttemptId) {
        if let Some(node) = self.nodes.get_mut(&pool.node_id) {
            node.reserved.insert(attempt);
            node.breaker.sent(attempt);
            if let Some(book) = node.pools.get_mut(&pool.pool_id) {
                book.reserved.insert(attempt);
                book.breaker.sent(attempt);
            }
        }
        let before =
            self.reservations.insert(attempt, Reservation { pool: pool.clone(), accepted_after: None });
        assert!(before.is_none(), "attempt {attempt} reserved twice");
    }

    /// The node took the attempt after having made the report of this number.
    pub fn accepted(&mut self, attempt: &AttemptId, accepted_after: u64) {
        if let Some(reservation) = self.reservations.get_mut(attempt) {
            reservation.accepted_after = Some(accepted_after);
            if let Some(node) = self.nodes.get_mut(&reservation.pool.node_id) {
                node.evidence.took_attempt();
            }
        }
    }

    /// Gives a claim back. `final_report` is the final report number, when it came: that
    /// of its last report before the attempt ended. Releasing twice has no effect.
    pub fn release(&mut self, attempt: &AttemptId, final_report: Option<u64>) -> Option<PoolKey> {
        let reservation = self.reservations.remove(attempt)?;
        let node = self.nodes.get_mut(&reservation.pool.node_id);
        if let Some(node) = node {
            node.reserved.remove(attempt);
            node.breaker.over(attempt);
            if let Some(book) = node.pools.get_mut(&reservation.pool.pool_id) {
                book.reserved.remove(attempt);
                book.breaker.over(attempt);
                if final_report.is_some() {
                    book.reported.remove(attempt);
                }
            }
            if let Some(final_report) = final_report {
                node.closed.insert(*attempt, final_report);
            }
        }
        Some(reservation.pool)
    }

    /// The pool refused a dispatch: it counts as full until its next report or `until`.
    pub fn hold(&mut self, pool: &PoolKey, until: Moment) {
        let book = self.nodes.get_mut(&pool.node_id).and_then(|node| node.pools.get_mut(&pool.pool_id));
        if let Some(book) = book {
            book.held_until = Some(until);
            self.pool_alarms.insert((until, pool.clone()));
        }
    }

    // ---- breakers ----

    /// The attempt got through to its engine: neither its pool nor its node has anything wrong.
    /// Returns whether a breaker of either was open.
    pub fn proven(&mut self, pool: &PoolKey) -> bool {
        let Some(node) = self.nodes.get_mut(&pool.node_id) else { return false };
        let mut was_open = node.breaker.blocks();
        node.breaker.succeeded();
        if let Some(book) = node.pools.get_mut(&pool.pool_id) {
            was_open |= book.breaker.blocks();
            book.breaker.succeeded();
        }
        was_open
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
        let book = self.nodes.get_mut(&pool.node_id).and_then(|node| node.pools.get_mut(&pool.pool_id));
        let until = book.and_then(|book| book.breaker.failed(now, attempt, task, dispatched));
        until.is_some_and(|until| self.pool_alarms.insert((until, pool.clone())))
    }

    /// What the task had counted against the pool was the request's own fault. Returns whether the
    /// pool takes tasks again by that.
    pub fn pool_absolved(&mut self, pool: &PoolKey, task: TaskId) -> bool {
        let book = self.nodes.get_mut(&pool.node_id).and_then(|node| node.pools.get_mut(&pool.pool_id));
        book.is_some_and(|book| book.breaker.withdraw(task))
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
        let Some(node) = self.nodes.get_mut(node_id) else { return false };
        node.breaker.failed(now, attempt, None, dispatched).is_some()
    }

    /// A stream of the node came to a whole end, whatever that was.
    pub fn stream_well(&mut self, node_id: &NodeId) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.breaker.succeeded();
        }
    }
}
