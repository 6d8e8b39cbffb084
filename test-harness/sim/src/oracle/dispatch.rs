//! Where an attempt may be sent, and when.

use super::*;

impl Oracle {
    /// What the task asked for, of the place that it is given.
    pub(super) fn is_where_it_must(
        constraints: &PlacementConstraints,
        pool: &PoolKey,
        node: &NodeView,
    ) -> bool {
        constraints.pin_allows(pool)
            && constraints.require_labels.iter().all(|(name, value)| node.labels.get(name) == Some(value))
            && (constraints.allow_fallback || !constraints.avoids(pool))
            && (!constraints.only_preferred() || constraints.prefers(pool))
    }

    /// [5] only to online nodes and ready pools, [4] never more than there are slots, [3] never
    /// while another attempt may write, [6] never past an older task that waits for such a slot.
    pub(crate) fn dispatched(
        &mut self,
        now: Moment,
        dispatch: &Dispatch,
        view: &ClusterView,
    ) -> Result<(), Broken> {
        let node = view.nodes.iter().find(|n| n.node_id == dispatch.pool.node_id);
        let node = node.ok_or_else(|| format!("dispatched to unknown node {}", dispatch.pool))?;
        let pool = node.pools.iter().find(|p| p.report.pool_id == dispatch.pool.pool_id);
        let pool = pool.ok_or_else(|| format!("dispatched to unknown pool {}", dispatch.pool))?;
        if node.liveness != Liveness::Online || !pool.report.ready || pool.report.draining {
            return Err(format!("[5] dispatched to {} while {:?}", dispatch.pool, node.liveness));
        }
        if !pool.report.models.contains(&dispatch.spec.model_ref) {
            return Err(format!("[5] dispatched to {}, which lacks the model", dispatch.pool));
        }
        if self.denied.contains(&dispatch.pool.node_id) {
            return Err(format!("[5] dispatched to {}, which does not let us in", dispatch.pool));
        }
        let model = self.tasks.get(&dispatch.task).map(|seen| seen.model);
        if model.is_some_and(|model| self.retired.contains(&model)) {
            return Err(format!("[5] dispatched to {}, whose model is retired", dispatch.pool));
        }
        // What runs at a replica that takes nothing has no slot of the others.
        let leaving: BTreeSet<AttemptId> = pool
            .report
            .replicas
            .iter()
            .filter(|r| !r.ready)
            .flat_map(|r| r.attempts.iter().copied())
            .collect();
        let open = self.tasks.values().filter(|t| {
            t.open.as_ref().is_some_and(|(attempt, p)| *p == dispatch.pool && !leaving.contains(attempt))
        });
        let open = open.count();
        if open >= pool.slots_total as usize {
            return Err(format!(
                "[4] {open} attempts are open on the {} slots of {}",
                pool.slots_total, dispatch.pool
            ));
        }
        let seen = self.tasks.get(&dispatch.task).ok_or("dispatched a task that was never admitted")?;
        if seen.culprit {
            return Err(format!(
                "{} has brought an engine down alone, and is given {}",
                dispatch.task, dispatch.pool
            ));
        }
        let beside =
            |other: &Seen| other.suspect && other.open.as_ref().is_some_and(|(_, p)| *p == dispatch.pool);
        if seen.suspect && self.tasks.values().any(beside) {
            return Err(format!("two that may have brought an engine down run on {}", dispatch.pool));
        }
        if let Some((attempt, pool)) = &seen.open {
            return Err(format!(
                "[3] dispatched {} while attempt {attempt} on {pool} has not ended",
                dispatch.task
            ));
        }
        if seen
            .constraints
            .as_ref()
            .is_some_and(|constraints| !Self::is_where_it_must(constraints, &dispatch.pool, node))
        {
            return Err(format!("{} was sent to {}, against its constraints", dispatch.task, dispatch.pool));
        }
        if self.draining.contains(&dispatch.pool.node_id) {
            return Err(format!("[5] {} was sent to {}, which is drained", dispatch.task, dispatch.pool));
        }
        if let Some(sick) = self.sick.get(&dispatch.pool).filter(|sick| sick.in_a_row().count() >= 3) {
            let rest = std::time::Duration::from_secs(1);
            let since = self.tasks.values().filter_map(|task| task.open.as_ref()).any(|(attempt, pool)| {
                *pool == dispatch.pool
                    && self.dispatched.get(attempt).is_some_and(|at| *at > sick.rests_from())
            });
            if since || now < sick.rests_from() + rest {
                return Err(format!("{} gets more than one attempt after {sick:?}", dispatch.pool));
            }
        }
        let failing = self.failing.get(&dispatch.pool.node_id).copied().unwrap_or_default();
        if failing.times >= 3 {
            let rest = std::time::Duration::from_secs(1);
            let since = self.tasks.values().filter_map(|task| task.open.as_ref()).any(|(attempt, pool)| {
                pool.node_id == dispatch.pool.node_id
                    && self.dispatched.get(attempt).is_some_and(|at| *at > failing.last)
            });
            if since || now < failing.last + rest {
                return Err(format!(
                    "{} gets more than one attempt after {failing:?}",
                    dispatch.pool.node_id
                ));
            }
        }
        if dispatch.first_index != seen.transcript.tokens {
            return Err(format!(
                "[3] {} goes on at {} where {} was next",
                dispatch.task, dispatch.first_index, seen.transcript.tokens
            ));
        }
        if seen.is_final {
            return Err(format!("{} goes on, and cannot be generated again", dispatch.task));
        }
        let kind = pool.report.engine;
        if !seen.goes_on_with(kind) {
            return Err(format!(
                "[3] {} goes on with {kind:?} where {:?} had begun",
                dispatch.task, seen.kind
            ));
        }
        let could_have_it = |other: &Seen| {
            let constraints = other.constraints.as_ref();
            other.queued_since.is_some()
                && other.goes_on_with(kind)
                && other.model == seen.model
                && !other.suspect
                && !other.tried.contains(&dispatch.pool)
                && constraints
                    .is_none_or(|constraints| Self::is_where_it_must(constraints, &dispatch.pool, node))
        };
        let older = self.tasks.iter().find(|(_, other)| {
            other.number < seen.number && other.batch == seen.batch && could_have_it(other)
        });
        if let Some((older, _)) = older {
            return Err(format!("[6] {} started before the older {older}", dispatch.task));
        }
        // [6] one start in eight is batch while both wait.
        let (model, batch) = (seen.model, seen.batch);
        let waits = self.tasks.iter().filter(|(_, other)| other.batch && could_have_it(other));
        let passed_over: Vec<TaskId> = waits.map(|(id, _)| *id).collect();
        for (id, other) in self.tasks.iter_mut().filter(|(_, other)| other.batch && other.model == model) {
            other.passed_over =
                if batch { 0 } else { other.passed_over + u32::from(passed_over.contains(id)) };
            if other.passed_over >= 8 {
                return Err(format!(
                    "[6] {} is the eighth that starts before the batch task {id}",
                    dispatch.task
                ));
            }
        }
        let seen = self.tasks.get_mut(&dispatch.task).expect("looked up above");
        seen.queued_since = None;
        seen.passed_over = 0;
        seen.dispatches += 1;
        if seen.transcript.tokens == 0 {
            seen.kind = kind;
        } else if seen.passes_on {
            seen.again = Some(dispatch.attempt);
        }
        seen.open = Some((dispatch.attempt, dispatch.pool.clone()));
        self.dispatched.insert(dispatch.attempt, now);
        Ok(())
    }
}
