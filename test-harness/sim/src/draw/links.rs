//! What is drawn of links: which nodes have one, what goes by them, and what befalls them. From a
//! generator of its own, so that a schedule without links is what it always was.

use attempt_link::MAX_RESUMING_LINKS;

use super::{NodeFault, NodePlan, Step};

/// What befalls the connections of a node's link. Its calls go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkFault {
    /// Nothing comes through in these directions.
    Cut { up: bool, down: bool },
    /// Nobody listens; what is established goes on.
    Refused,
    /// What is established is gone at once, as these ends hear.
    Reset(HeardBy),
    /// Most POSTs come to nothing.
    PostsLost,
    /// Most are read, and their answers lost.
    AnswersLost,
    /// Some take seconds, and are overtaken.
    PostsLate,
    /// One packet is lost, and sent again.
    PacketLost,
    /// GETs are taken, and nobody answers them: a proxy that waits for their end.
    Mute,
}

/// Who hears that a connection is gone. To the other end it is half open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeardBy {
    Both,
    Node,
    ControlPlane,
}

/// Of what goes by links.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkDraws {
    /// Of a thousand tokens: longer than a turn of a link.
    pub long_frames: u32,
    /// Of a thousand starts: with a payload that goes alone.
    pub large_payloads: u32,
    /// Of a thousand attempts: those of which a node keeps what was not seen.
    pub unseen: u32,
    /// Of a thousand attempts: those of whose frames their link is not told.
    pub unannounced: u32,
    /// Of a thousand attempts: those whose drivers stand still.
    pub stuck: u32,
}

/// Draws nothing in half of all schedules, but for those with so many nodes that their links wait for
/// each other. `is_roomy`: no bound of the schedule is near.
pub(super) fn draw(
    seed: u64,
    nodes: &mut [NodePlan],
    horizon_ms: u64,
    is_roomy: bool,
    steps: &mut Vec<(u64, Step)>,
) -> LinkDraws {
    let mut r = fastrand::Rng::with_seed(seed ^ 0x6c69_6e6b);
    let has_all = match r.u8(..4) {
        _ if nodes.len() > MAX_RESUMING_LINKS => true,
        0 | 1 => return LinkDraws::default(),
        drawn => drawn == 2,
    };
    for node in nodes.iter_mut() {
        node.link = has_all || r.bool();
    }
    let linked: Vec<usize> = (0..nodes.len()).filter(|node| nodes[*node].link).collect();
    if linked.is_empty() {
        return LinkDraws::default();
    }
    for _ in 0..r.usize(2..14) {
        let (at, node) = (r.u64(10_000..horizon_ms), linked[r.usize(..linked.len())]);
        if r.bool() {
            crowd(&mut r, at, node, steps);
        }
        fault(&mut r, at, node, steps);
    }
    if linked.len() > MAX_RESUMING_LINKS {
        storm(&mut r, &linked, horizon_ms, steps);
    }
    LinkDraws {
        long_frames: if is_roomy && r.u8(..3) == 0 { r.u32(20..300) } else { 0 },
        large_payloads: if r.u8(..4) == 0 { r.u32(20..200) } else { 0 },
        unseen: [0, 0, 500, 1_000][r.usize(..4)],
        unannounced: if r.u8(..6) == 0 { r.u32(20..200) } else { 0 },
        stuck: if r.u8(..6) == 0 { r.u32(10..100) } else { 0 },
    }
}

/// Some tasks come just before something befalls a link, and some of them are cancelled during it.
fn crowd(r: &mut fastrand::Rng, at: u64, node: usize, steps: &mut Vec<(u64, Step)>) {
    let submits: Vec<usize> =
        (0..steps.len()).filter(|step| matches!(steps[*step].1, Step::Submit { .. })).collect();
    for _ in 0..r.usize(4..12) {
        let Some((when, Step::Submit { task })) =
            submits.get(r.usize(..submits.len())).map(|step| &mut steps[*step])
        else {
            continue;
        };
        *when = at - r.u64(..5_000);
        let task = *task;
        if r.u8(..3) == 0 {
            steps.push((at + r.u64(..6_000), Step::Cancel { task }));
        }
    }
    if r.u8(..3) == 0 {
        steps.push((at - 5_000, Step::SlowEngine { node, for_ms: 40_000 }));
    }
}

/// All tasks come together, and all links are cut while they run.
fn storm(r: &mut fastrand::Rng, linked: &[usize], horizon_ms: u64, steps: &mut Vec<(u64, Step)>) {
    let begins = r.u64(20_000..horizon_ms / 2);
    for (at, step) in steps.iter_mut() {
        if matches!(step, Step::Submit { .. }) {
            *at = begins + r.u64(..500);
        }
    }
    if r.bool() {
        let reset = |node| Step::Link { node, fault: LinkFault::Reset(HeardBy::Both), for_ms: 0 };
        return steps.extend(linked.iter().map(|node| (begins + 700, reset(*node))));
    }
    steps.push((begins + 700, Step::AllLinks { for_ms: r.u64(2_700..3_400) }));
}

fn fault(r: &mut fastrand::Rng, at: u64, node: usize, steps: &mut Vec<(u64, Step)>) {
    let for_ms = if r.u8(..4) == 0 { r.u64(8_000..25_000) } else { r.u64(100..8_000) };
    let heard_by = [HeardBy::Both, HeardBy::Node, HeardBy::ControlPlane][r.usize(..3)];
    let cut = |up, down| Step::Link { node, fault: LinkFault::Cut { up, down }, for_ms };
    let of = |fault| Step::Link { node, fault, for_ms };
    let step = match r.u8(..25) {
        0 | 1 => cut(true, true),
        2 => cut(true, false),
        3 => cut(false, true),
        // The heartbeats are cut with it.
        4 | 5 => Step::Partition { node, to_cp: true, to_node: true, for_ms },
        6 => of(LinkFault::Refused),
        7..=9 => of(LinkFault::Reset(heard_by)),
        10 | 11 => of(LinkFault::PostsLost),
        12 | 13 => of(LinkFault::AnswersLost),
        14 | 15 => of(LinkFault::PostsLate),
        16 => of(LinkFault::PacketLost),
        17 => of(LinkFault::Mute),
        18 => Step::AllLinks { for_ms },
        19 => {
            // SIGTERM while the link is down.
            steps.push((at, cut(true, true)));
            steps.push((at + r.u64(..3_000), Step::LeaveNode { node, down_ms: r.u64(100..5_000) }));
            return;
        }
        20 => {
            // Its link is refused where it is reset: nobody is left to dial.
            steps.push((at, of(LinkFault::Reset(heard_by))));
            of(LinkFault::Refused)
        }
        21 => Step::PowerLoss { down_ms: if r.bool() { r.u64(200..8_000) } else { r.u64(20_000..60_000) } },
        22 => {
            // What its predecessor has sent reaches a node of the next control plane.
            steps.push((at, Step::Link { node, fault: LinkFault::PostsLate, for_ms: 6_000 }));
            let lost = Step::RestartControl { down_ms: r.u64(10..800) };
            steps.push((at + r.u64(..4_000), lost));
            return;
        }
        23 => {
            // Longer than a link goes on whose credential does not count.
            Step::NodeFault { node, fault: NodeFault::Denies, for_ms: r.u64(61_000..80_000) }
        }
        _ => {
            // Mute from its beginning on: it is served without.
            steps.push((at, Step::CrashNode { node, down_ms: 1_000 }));
            Step::Link { node, fault: LinkFault::Mute, for_ms: r.u64(5_000..60_000) }
        }
    };
    steps.push((at, step));
}
