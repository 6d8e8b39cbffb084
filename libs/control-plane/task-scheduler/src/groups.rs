//! The waiting tasks of a lane by what they ask for, so that the next task for a freed pool is found
//! without asking each of them.
//!
//! Tasks that ask for the same are one group: what has no place for its oldest has none for the
//! others. A group knows which pools take it, and is passed over with one look at which of those
//! are free; one that no placeable pool takes is not looked at at all. Tasks that bounced off the
//! same pools at no cost are one group too. Those that have had a try wait each for their own pause,
//! and are looked at one by one: they are few, as tries are. Some groups stay known when their last
//! task has gone: the next one that asks for the same need not ask every pool.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use multi_node_placement::{Eligible, PoolIndex, TaskShape};
use pool_registry_types::engines::EngineSet;
use pool_registry_types::placement::PlacementConstraints;
use pool_registry_types::task::Priority;
use pool_registry_types::{ModelRef, PoolKey, TaskId};
use task_stream::TaskSpec;

/// What decides which pools may take a task that has had no try.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ask {
    engines: EngineSet,
    passes_on: bool,
    ctx: Option<u32>,
    constraints: Option<PlacementConstraints>,
    /// Pools that have failed it for free, and those that cannot do what it asks.
    tried: Vec<PoolKey>,
    lacking: Vec<PoolKey>,
}

impl Ask {
    /// `constraints` of the task may be left out.
    pub(crate) fn of(
        spec: &TaskSpec,
        with_constraints: bool,
        tried: &[PoolKey],
        lacking: &[PoolKey],
    ) -> Self {
        Self {
            engines: spec.engines,
            passes_on: spec.passes_on,
            ctx: spec.ctx,
            constraints: spec.placement.clone().filter(|_| with_constraints),
            tried: tried.to_vec(),
            lacking: lacking.to_vec(),
        }
    }

    /// The same of a shape.
    pub(crate) fn of_shape(shape: &TaskShape<'_>) -> Self {
        Self {
            engines: shape.engines,
            passes_on: shape.passes_on,
            ctx: shape.ctx,
            constraints: shape.constraints.cloned(),
            tried: shape.tried.to_vec(),
            lacking: shape.lacking.to_vec(),
        }
    }

    fn shape<'a>(&'a self, model: &'a ModelRef) -> TaskShape<'a> {
        TaskShape {
            engines: self.engines,
            passes_on: self.passes_on,
            ctx: self.ctx,
            constraints: self.constraints.as_ref(),
            tried: &self.tried,
            lacking: &self.lacking,
            ..TaskShape::plain(model)
        }
    }
}

/// Groups of a lane that stay known without a task.
const MAX_IDLE: usize = 4;

/// Where a waiting task stands among the groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    Of(usize),
    OnItsOwn,
}

#[derive(Debug, Default)]
struct Group {
    ask: Option<Ask>,
    waiting: [BTreeSet<(u64, TaskId)>; 2],
    eligible: Eligible,
}

impl Group {
    fn is_empty(&self) -> bool {
        self.waiting.iter().all(BTreeSet::is_empty)
    }
}

/// The next one in the order of admission: of a group, or on its own.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next<'g> {
    Group(TaskId, &'g Eligible),
    OnItsOwn(TaskId),
}

/// All waiting tasks of one lane.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    groups: Vec<Group>,
    vacant: Vec<usize>,
    /// Groups that lost their last task, each once; some have a task again.
    idle: VecDeque<usize>,
    by_ask: BTreeMap<Ask, usize>,
    members: BTreeMap<TaskId, Member>,
    /// The groups that some placeable pool takes, by their oldest task, for each priority.
    heads: [BTreeMap<u64, usize>; 2],
    own: [BTreeSet<(u64, TaskId)>; 2],
    /// Groups whose pools are not known yet.
    fresh: BTreeSet<usize>,
    /// The version of the index up to which the others' pools are right.
    seen: u64,
}

const fn place(priority: Priority) -> usize {
    match priority {
        Priority::Interactive => 0,
        Priority::Batch => 1,
    }
}

impl Groups {
    /// Takes a task in; without an ask it is looked at on its own.
    pub(crate) fn push(&mut self, priority: Priority, number: u64, task: TaskId, ask: Option<Ask>) {
        let Some(ask) = ask else {
            self.own[place(priority)].insert((number, task));
            self.members.insert(task, Member::OnItsOwn);
            return;
        };
        let known = self.by_ask.get(&ask).copied();
        let at = known.unwrap_or_else(|| self.found(ask));
        self.change(at, priority, |waiting| waiting.insert((number, task)));
        self.members.insert(task, Member::Of(at));
    }

    fn found(&mut self, ask: Ask) -> usize {
        let at = self.vacant.pop().unwrap_or_else(|| {
            self.groups.push(Group::default());
            self.groups.len() - 1
        });
        self.groups[at] = Group { ask: Some(ask.clone()), ..Group::default() };
        self.by_ask.insert(ask, at);
        self.fresh.insert(at);
        at
    }

    pub(crate) fn remove(&mut self, priority: Priority, number: u64, task: TaskId) {
        match self.members.remove(&task) {
            None => {}
            Some(Member::OnItsOwn) => {
                self.own[place(priority)].remove(&(number, task));
            }
            Some(Member::Of(at)) => {
                self.change(at, priority, |waiting| waiting.remove(&(number, task)));
                if self.groups[at].is_empty() && !self.idle.contains(&at) {
                    self.idle.push_back(at);
                }
                if self.idle.len() > MAX_IDLE {
                    let oldest = self.idle.pop_front().filter(|at| self.groups[*at].is_empty());
                    oldest.into_iter().for_each(|at| self.forget(at));
                }
            }
        }
    }

    /// Forgets a group without a task.
    fn forget(&mut self, at: usize) {
        if let Some(ask) = std::mem::take(&mut self.groups[at]).ask {
            self.by_ask.remove(&ask);
            self.fresh.remove(&at);
            self.vacant.push(at);
        }
    }

    /// Changes who waits in a group, and keeps its place among the others.
    fn change(
        &mut self,
        at: usize,
        priority: Priority,
        change: impl FnOnce(&mut BTreeSet<(u64, TaskId)>) -> bool,
    ) {
        let p = place(priority);
        let group = &mut self.groups[at];
        let first = |group: &Group| group.waiting[p].first().map(|(number, _)| *number);
        let before = first(group);
        change(&mut group.waiting[p]);
        let after = first(group);
        if before != after && !group.eligible.is_nowhere() {
            if let Some(number) = before {
                self.heads[p].remove(&number);
            }
            self.heads[p].extend(after.map(|number| (number, at)));
        }
    }

    /// Learns which pools take which group, as far as that has changed.
    pub(crate) fn review(&mut self, index: &PoolIndex, model: &ModelRef) {
        let version = index.version(model);
        if self.seen == version {
            for at in std::mem::take(&mut self.fresh) {
                self.review_group(index, model, at);
            }
            return;
        }
        self.seen = version;
        self.fresh.clear();
        for at in 0..self.groups.len() {
            self.review_group(index, model, at);
        }
    }

    fn review_group(&mut self, index: &PoolIndex, model: &ModelRef, at: usize) {
        let Group { ask: Some(ask), waiting, eligible } = &mut self.groups[at] else { return };
        let was_nowhere = eligible.is_nowhere();
        index.review(&ask.shape(model), eligible);
        if was_nowhere == eligible.is_nowhere() {
            return;
        }
        for (heads, waiting) in self.heads.iter_mut().zip(waiting) {
            let Some((number, _)) = waiting.first() else { continue };
            if was_nowhere {
                heads.insert(*number, at);
            } else {
                heads.remove(number);
            }
        }
    }

    /// The tasks of a priority of which one may start, oldest first: of a group its oldest only.
    pub(crate) fn oldest_first(&self, priority: Priority) -> impl Iterator<Item = Next<'_>> {
        let p = place(priority);
        let mut groups = self.heads[p].iter().peekable();
        let mut own = self.own[p].iter().peekable();
        std::iter::from_fn(move || {
            let group_first = match (groups.peek(), own.peek()) {
                (Some((group, _)), Some((single, _))) => *group < single,
                (group, _) => group.is_some(),
            };
            if group_first {
                let group = &self.groups[*groups.next()?.1];
                let (_, oldest) = group.waiting[p].first()?;
                return Some(Next::Group(*oldest, &group.eligible));
            }
            own.next().map(|(_, task)| Next::OnItsOwn(*task))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::btree_map::Entry;
    use std::sync::Arc;

    use multi_node_placement::{Availability, Candidate, Strategy};
    use pool_registry_types::pool::EngineKind;
    use pool_registry_types::{NodeId, PoolId};
    use proptest::prelude::{Strategy as _, *};
    use uuid::Uuid;

    use super::*;

    fn id(n: u64) -> TaskId {
        TaskId(Uuid::from_u128(u128::from(n)))
    }

    fn model() -> ModelRef {
        ModelRef::new("m").unwrap()
    }

    fn pool(node: u8, ctx_max: u32, placeable: bool, free: bool) -> Candidate {
        Candidate {
            key: PoolKey::new(NodeId::new(&format!("n{node}")).unwrap(), PoolId::new("p").unwrap()),
            availability: if placeable { Availability::Placeable } else { Availability::Suspect },
            engine: Some(EngineKind::LlamaCpp),
            models: vec![model()],
            ctx_max: Some(ctx_max),
            device_mask: None,
            labels: Arc::default(),
            slots_total: 1,
            slots_busy: u32::from(!free),
            held: false,
            vram_free_bytes: None,
            load_estimate_ms: None,
            fits_now: true,
            passes_on: false,
        }
    }

    fn ask(ctx: u32) -> Ask {
        Ask {
            engines: EngineSet::ALL,
            passes_on: false,
            ctx: Some(ctx),
            constraints: None,
            tried: Vec::new(),
            lacking: Vec::new(),
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Pool(u8, u32, bool, bool),
        Gone(u8),
        Push(u64, u32, bool),
        Remove(u64),
    }

    fn step() -> impl proptest::strategy::Strategy<Value = Step> {
        prop_oneof![
            (0_u8..5, 1_u32..5, any::<bool>(), any::<bool>()).prop_map(|(n, c, p, f)| Step::Pool(n, c, p, f)),
            (0_u8..5).prop_map(Step::Gone),
            (0_u64..40, 1_u32..6, any::<bool>()).prop_map(|(n, c, b)| Step::Push(n, c, b)),
            (0_u64..40).prop_map(Step::Remove),
        ]
    }

    proptest! {
        // CLOUD-1773
        /// Whatever comes and goes, the next task is the one that a walk over all would find.
        #[test]
        fn the_next_task_is_the_one_that_a_walk_over_all_finds(
            steps in prop::collection::vec(step(), 1..120)
        ) {
            let (mut index, mut groups) = (PoolIndex::new(Strategy::LeastLoaded), Groups::default());
            let mut pools: BTreeMap<u8, Candidate> = BTreeMap::new();
            let mut waiting: BTreeMap<u64, (u32, Priority)> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Pool(n, ctx, placeable, free) => {
                        let candidate = pool(n, ctx, placeable, free);
                        index.upsert(candidate.clone());
                        pools.insert(n, candidate);
                    }
                    Step::Gone(n) => {
                        if let Some(gone) = pools.remove(&n) {
                            index.remove(&gone.key);
                        }
                    }
                    Step::Push(n, ctx, batch) => {
                        let priority = if batch { Priority::Batch } else { Priority::Interactive };
                        if let Entry::Vacant(free) = waiting.entry(n) {
                            free.insert((ctx, priority));
                            groups.push(priority, n, id(n), Some(ask(ctx)));
                        }
                    }
                    Step::Remove(n) => {
                        if let Some((_, priority)) = waiting.remove(&n) {
                            groups.remove(priority, n, id(n));
                        }
                    }
                }
                groups.review(&index, &model());
                for priority in Priority::BOTH {
                    let found = groups.oldest_first(priority).find_map(|next| match next {
                        Next::Group(task, eligible) => {
                            index.has_free_of(&model(), eligible).then_some(task)
                        }
                        Next::OnItsOwn(_) => None,
                    });
                    let takes = |ctx: u32| {
                        pools.values().any(|pool| {
                            let free = pool.availability == Availability::Placeable && pool.has_free_slot();
                            free && pool.ctx_max.is_some_and(|has| ctx <= has)
                        })
                    };
                    let walked = waiting.iter().find(|(_, (ctx, of))| *of == priority && takes(*ctx));
                    prop_assert_eq!(found, walked.map(|(n, _)| id(*n)));
                }
            }
        }
    }
}
