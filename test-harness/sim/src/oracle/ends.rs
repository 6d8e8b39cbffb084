//! How attempts and tasks may end.

use super::*;

/// A stream that is too long has at least all bytes but so many: the frame that did not fit, and the
/// comments that are in no log.
const LAST_BYTES: usize = 1_000;

impl Oracle {
    /// The relay tells the core the end of an attempt. Returns the pool whose engine failed with it.
    pub(crate) fn ended(
        &mut self,
        now: Moment,
        task: TaskId,
        attempt: AttemptId,
        how: &HowEnded,
        tokens: u64,
    ) -> Option<PoolKey> {
        if *how == HowEnded::Finished {
            self.got_through(now, task, true);
        }
        let seen = self.tasks.get_mut(&task)?;
        let (_, pool) = seen.open.take_if(|(open, _)| *open == attempt)?;
        let is_wrongly_rejected = seen.taken && matches!(how, HowEnded::Rejected(_));
        let mut failed = None;
        match how {
            HowEnded::NodeError(_) => {
                self.broken.remove(&pool.node_id);
                self.failing.remove(&pool.node_id);
            }
            HowEnded::Broken(_)
            | HowEnded::NoAnswer(_)
            | HowEnded::NodeFailed(_)
            | HowEnded::TimedOut(Overdue::Silence | Overdue::Acceptance) => {
                *self.broken.entry(pool.node_id.clone()).or_default() += 1;
                let failing = self.failing.entry(pool.node_id.clone()).or_default();
                let at = self.dispatched.get(&attempt).copied().unwrap_or_default();
                if failing.times == 0 || at > failing.last {
                    *failing = Failing { times: failing.times + 1, last: now };
                }
            }
            HowEnded::Denied(_) => drop(self.denied.insert(pool.node_id.clone())),
            _ => {}
        }
        let dispatched = self.dispatched.remove(&attempt).unwrap_or_default();
        match how {
            HowEnded::NodeError(body) if body.cause == Some(EndCause::Engine5xx) => {
                failed = Some(pool.clone());
                // What a process before it has failed says nothing of its engines.
                if self.booted.get(&pool.node_id).is_none_or(|booted| dispatched > *booted) {
                    self.sick.entry(pool.clone()).or_default().failed(now, dispatched, task, now);
                }
                self.failed.entry(pool.clone()).or_default().insert(task);
                let answer = body.message.clone();
                seen.engine_failures.push((pool.clone(), now, answer.clone()));
                let goes_on = tokens == 0 || seen.continues;
                let before = seen.engine_failures.clone();
                let own = before.iter().any(|(other, at, reported)| {
                    (*other == pool || *reported == answer) && self.served_another(&pool, task, *at)
                });
                if own && goes_on {
                    for sick in self.sick.values_mut() {
                        // With nothing left of it, what failed beside it counts for itself.
                        if sick.tasks.remove(&task).is_some() && sick.tasks.is_empty() {
                            sick.last = Moment::ZERO;
                        }
                    }
                    self.tasks.entry(task).and_modify(|seen| seen.own_fault = true);
                }
            }
            HowEnded::NodeError(body) if body.cause == Some(EndCause::ReplayDiffers) => seen.differed = true,
            _ => {}
        }
        if is_wrongly_rejected {
            self.rejected_wrongly(now, dispatched, task, pool.clone());
        }
        let seen = self.tasks.get_mut(&task)?;
        let (free, died) = match how {
            HowEnded::Refused(_) | HowEnded::NeverSent(_) | HowEnded::OwnShortage { .. } => (true, false),
            HowEnded::Denied(_) | HowEnded::NodeFailed(_) | HowEnded::Rejected(_) => {
                let rejected = matches!(how, HowEnded::Rejected(_));
                seen.rejected_by.extend((rejected && !seen.taken).then(|| pool.clone()));
                seen.tried.push(pool.clone());
                if !rejected {
                    // The node has failed it, whichever pool of it is asked.
                    let names = ["pool-0", "pool-1"].map(|name| PoolId::new(name).expect("a valid pool id"));
                    seen.tried.extend(names.map(|name| PoolKey::new(pool.node_id.clone(), name)));
                }
                (true, false)
            }
            HowEnded::NodeError(body) if body.code == ErrorCode::PoolUnready => (true, false),
            HowEnded::NodeError(body) => {
                let alone = body.crash.as_ref().is_some_and(|crash| crash.suspects == 1);
                let suspect = body.crash.as_ref().is_some_and(|crash| crash.suspect);
                seen.culprit |= alone && suspect;
                seen.suspect |= suspect;
                let died = matches!(body.cause, Some(EndCause::EngineDied | EndCause::EngineTimeout));
                (false, died && !alone)
            }
            HowEnded::TimedOut(Overdue::FirstToken | Overdue::TokenIdle) => (false, true),
            _ => (false, false),
        };
        if !free {
            seen.tries += 1;
            seen.engine_deaths += u32::from(died);
            seen.tried.push(pool);
        }
        if *how != HowEnded::Finished && (tokens == 0 || seen.continues) && seen.terminal.is_none() {
            seen.queued_since = Some(now);
        }
        failed
    }

    /// What a terminal error must have behind it.
    pub(crate) fn closed(
        &self,
        now: Moment,
        task: TaskId,
        error: &ErrorBody,
        core: &ControlCore,
        plan: &Plan,
    ) -> Result<(), Broken> {
        let seen = self.tasks.get(&task).ok_or("a terminal error without a task")?;
        if seen.canceled && seen.queued_since.is_none() && error.code == ErrorCode::Draining {
            return Err(format!("{task} was canceled, and ends with DRAINING"));
        }
        match error.code {
            ErrorCode::PoolUnavailable if seen.culprit => {
                if error.retriable {
                    Err(format!("{task} brings engines down, and may be sent again"))
                } else {
                    Ok(())
                }
            }
            ErrorCode::ModelNotAvailable | ErrorCode::NodeUnavailable => {
                self.unavailable(now, error.code, seen.model, seen.constraints.as_ref(), core, plan)
            }
            ErrorCode::InvalidParams if seen.taken => {
                Err(format!("{task} was refused, and a node had taken it"))
            }
            ErrorCode::InvalidParams => {
                let view = core.view(now);
                let takes = |node: &NodeView| {
                    let pools = node
                        .pools
                        .iter()
                        .filter(|pool| pool.report.ready && !pool.report.draining && !pool.tripped);
                    let open = node.liveness == Liveness::Online && node.intent == Intent::Serving;
                    open && pools.into_iter().any(|pool| {
                        let key = PoolKey::new(node.node_id.clone(), pool.report.pool_id.clone());
                        let has = pool.report.models.iter().any(|m| m.as_str() == format!("m{}", seen.model));
                        let constraints = seen.constraints.as_ref();
                        has && !seen.rejected_by.contains(&key)
                            && constraints
                                .is_none_or(|constraints| Self::is_where_it_must(constraints, &key, node))
                    })
                };
                match view.nodes.iter().find(|node| takes(node)) {
                    Some(node) => Err(format!("{task} was refused, and {} was not asked", node.node_id)),
                    None if seen.rejected_by.is_empty() => Err(format!("{task} was refused by no node")),
                    None => Ok(()),
                }
            }
            ErrorCode::PoolUnavailable if seen.tries < 3 && seen.engine_deaths < 2 && !seen.own_fault => {
                Err(format!(
                    "{task} ended as tried out after {} tries and {} dead engines",
                    seen.tries, seen.engine_deaths
                ))
            }
            ErrorCode::WorkerReset
                if seen.continues
                    && seen.tries < 3
                    && seen.engine_deaths < 2
                    && !seen.differed
                    // What was sent may take longer again than there is time.
                    && !(seen.passes_on && seen.deadline.is_some()) =>
            {
                Err(format!("{task} continues, and was given up after {} tries", seen.tries))
            }
            ErrorCode::DeadlineExceeded
                if seen.deadline.is_some_and(|at| {
                    let stall = std::time::Duration::from_millis(self.stall_total_ms);
                    now > at + std::time::Duration::from_secs(1) + stall
                }) =>
            {
                Err(format!("[6] {task} ended at {} ms, long after its deadline", now.as_millis()))
            }
            ErrorCode::DeadlineExceeded if now < seen.patient_until => {
                Err(format!("{task} ended for want of time before {} ms", seen.patient_until.as_millis()))
            }
            ErrorCode::QueueFullDropLru if seen.dispatches > 0 => {
                Err(format!("{task} has run, and was dropped for a newer one"))
            }
            ErrorCode::PayloadTooLarge
                if seen.transcript.bytes + LAST_BYTES <= plan.log_bytes.min(plan.attempt_bytes) =>
            {
                Err(format!("{task} ended as too long after {} bytes", seen.transcript.bytes))
            }
            ErrorCode::WorkerReset if seen.transcript.tokens == 0 => {
                Err(format!("{task} ended with WORKER_RESET without a token"))
            }
            _ => Ok(()),
        }
    }

    /// When a task may be told that there is no model, or no node, for it.
    fn unavailable(
        &self,
        now: Moment,
        code: ErrorCode,
        model: usize,
        constraints: Option<&PlacementConstraints>,
        core: &ControlCore,
        plan: &Plan,
    ) -> Result<(), Broken> {
        let pinned = constraints.and_then(PlacementConstraints::pinned_node);
        let liveness = pinned.and_then(|node_id| core.registry().liveness(node_id));
        let draining =
            pinned.is_some_and(|node_id| core.registry().intent(node_id) == Some(Intent::Draining));
        if code == ErrorCode::NodeUnavailable {
            let Some(node_id) = pinned else {
                return Err("pinned to no node, and ended for want of one".into());
            };
            let there = matches!(liveness, Some(Liveness::Online | Liveness::Suspect));
            return if there && !draining {
                Err(format!("ended for want of {node_id}, which is {liveness:?}"))
            } else {
                Ok(())
            };
        }
        if self.retired.contains(&model) {
            return Ok(());
        }
        if let Some(node_id) = pinned.filter(|_| liveness.is_some_and(|l| l != Liveness::Online)) {
            return Err(format!(
                "ended for want of its model, and {node_id}, to which it is pinned, is {liveness:?}"
            ));
        }
        let reported = self.models.get(&model).copied();
        match reported.filter(|at| now < *at + plan.timing.node_timeout) {
            Some(at) => Err(format!("ended for want of m{model}, reported at {} ms", at.as_millis())),
            None => Ok(()),
        }
    }

    /// A task was refused at admission.
    pub(crate) fn refused(
        &self,
        now: Moment,
        error: &ErrorBody,
        task: &TaskPlan,
        core: &ControlCore,
        plan: &Plan,
    ) -> Result<(), Broken> {
        match error.code {
            ErrorCode::ModelNotAvailable | ErrorCode::NodeUnavailable => {
                self.unavailable(now, error.code, task.model, task.constraints.as_ref(), core, plan)
            }
            _ => Ok(()),
        }
    }

    /// A prompt that kills engines must not walk through the fleet.
    pub(crate) fn poison(&self) -> Result<(), Broken> {
        match self.tasks.iter().find(|(_, seen)| seen.engine_deaths > 2) {
            Some((id, seen)) => Err(format!("{id} killed {} engines", seen.engine_deaths)),
            None => Ok(()),
        }
    }
}
