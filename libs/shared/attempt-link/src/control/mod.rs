//! The control plane's end of a lane: one thread's link to one node.
//!
//! [`ControlLane`] dials, keeps one link, sends starts, stops and resumes, and hands out what the node
//! writes, attempt by attempt and without a gap. It is told what has happened and says what is to be
//! done, as [`Action`]s; the shell around it owns connections, the timer ([`ControlLane::next_deadline`])
//! and the relays. What an attempt's end means for its task is not known here.
//!
//! What is handed out counts as taken: the shell gives it to the attempt's relay before it calls again.

mod attempts;
mod dials;
mod link;
mod posts;
mod relayed;
mod stops;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pool_registry_types::{AttemptId, BootId, ErrorBody, Moment, TaskId};

use crate::Rule;
use crate::content::{Acceptance, AnswerHead, FrameTokens};
use crate::wire::{ControlAnswer, ControlBody, LifeId, LinkQuery};

pub use attempts::{DuplicateStart, StartTaken};
pub use dials::ConnectionEnd;
pub use posts::{PostId, PostOutcome, PostRequest};
pub use relayed::Relayed;

use attempts::Attempt;
use dials::Dial;
use link::{Interruption, Link};
use posts::Post;
use stops::{Aged, Stops};

/// Between two dials of a link that is interrupted. Source: .specs/01 CLOUD-2651.
const DIAL_EVERY: Duration = Duration::from_millis(500);
/// The same once all that ran on it is lost.
const DIAL_EVERY_WHEN_LOST: Duration = Duration::from_secs(2);
/// The same where a node that has just registered does not know with whom: its answer is on its way.
const DIAL_EVERY_WHEN_EARLY: Duration = Duration::from_millis(50);
const KNOWN_WITHIN: Duration = Duration::from_secs(1);
/// The same after the first dial of an interruption, where that broke: a process that is killed may
/// still have taken it, and refuses the next one.
const DIAL_EVERY_WHEN_BROKEN: Duration = Duration::from_millis(10);
/// From a dial to its hello.
const DIAL_BOUND: Duration = Duration::from_secs(1);
const MAX_DIALS: usize = 3;
/// A link on which something runs, or is waited for, without a byte. Source: .specs/01 CLOUD-2650.
const SILENT_BUSY: Duration = Duration::from_millis(2_500);
/// The same of a link without attempts.
const SILENT_EMPTY: Duration = Duration::from_secs(25);
/// An interruption after which nothing more is dialled for what ran, and the end of dials under way.
const GIVE_UP: Duration = Duration::from_secs(10);
const GIVE_UP_DIALS: Duration = Duration::from_secs(12);
/// Quiet for so long, and a dial that fails: two ways say that the node is gone.
const QUIET: Duration = task_stream::QUIET;
/// A POST whose last byte was taken is answered within this. Source: .specs/01 CLOUD-2623.
const POST_ANSWER: Duration = Duration::from_secs(2);
/// A POST of which no byte is taken for so long is given up.
const POST_STUCK: Duration = Duration::from_secs(5);
/// A POST after one that went wrong.
const POST_RETRY: Duration = Duration::from_millis(500);
/// What was seen goes up at least so often while attempts run.
const SEEN_EVERY: Duration = Duration::from_secs(2);
/// What is done goes up within this.
const DONE_WITHIN: Duration = Duration::from_millis(500);
/// Orders that do not arrive for so long, while the link lives, are evidence against the node.
const UNDELIVERABLE: Duration = Duration::from_secs(5);
/// The node has more of an attempt, and brings nothing of it.
const BEHIND: Duration = Duration::from_secs(2);
/// An attempt that no `alive` names is silent.
const UNNAMED: Duration = Duration::from_secs(10);
/// A node without a link is known by dials without a hello for so long.
const NO_HELLO: Duration = Duration::from_secs(3);
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// A link that lives and whose credential is refused is dialled anew, no more often than this.
const REPLACE_EVERY: Duration = Duration::from_secs(5);
/// A timer that comes so late shows that the process stood still.
const STALL: Duration = Duration::from_millis(500);
/// Payloads that go up alone at a time.
const MAX_SINGLES: usize = 8;
/// Resumes of an attempt, one after the other, that bring nothing new; what is more is no use.
const MAX_FRUITLESS: u32 = 3;
/// Links in a row that end by a bad record before any `alive`.
const MAX_BAD_LINKS: u32 = 5;
/// Most stops that wait for a link, and how long each does: a node has ended what nobody reads by then.
const MAX_STOPS: usize = 64 * 1024;
const STOP_KEPT: Duration = Duration::from_secs(600);
/// Most attempts that wait to be called done; the node lets them go by itself.
const MAX_DONE: usize = 64 * 1024;
/// Tasks whose last start here was never accepted.
const MAX_UNKNOWN_TASKS: usize = 4 * 1024;

/// What the shell is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Open a connection and send the GET; files of credentials are read again before.
    Dial(LinkQuery),
    /// Read nothing more of the GET `n`, and close it.
    Close {
        n: u64,
    },
    /// Send a POST; `fresh`: not on a connection that was used before.
    Post {
        id: PostId,
        request: PostRequest,
        fresh: bool,
    },
    /// Nobody waits for the answer any more: close its connection.
    AbandonPost {
        id: PostId,
    },
    /// The last byte of the attempt's start was taken: its acceptance is awaited from now on.
    Sent {
        attempt: AttemptId,
    },
    Accepted {
        attempt: AttemptId,
        acceptance: Acceptance,
    },
    Refused {
        attempt: AttemptId,
        error: ErrorBody,
    },
    /// The attempt is asked for again, from `from` on: what its relay has half read is void.
    Restart {
        attempt: AttemptId,
        from: u64,
    },
    /// It is read again. It had been accepted before.
    Resumed {
        attempt: AttemptId,
    },
    Head {
        attempt: AttemptId,
        head: AnswerHead,
    },
    /// Whole frames. `first` may lie before what was taken, the end never does.
    Frames {
        attempt: AttemptId,
        first: u64,
        count: u32,
        bytes: Bytes,
    },
    /// Of the frames from `first` on, which follow.
    TokenIds {
        attempt: AttemptId,
        first: u64,
        frames: Vec<FrameTokens>,
    },
    Error {
        attempt: AttemptId,
        error: ErrorBody,
    },
    /// The attempt is over; nothing more of it comes.
    Ended {
        attempt: AttemptId,
        report_seq: u64,
    },
    /// It was cancelled, or could not go, before any byte of it did.
    NeverSent {
        attempt: AttemptId,
    },
    /// It was never accepted, and never will be; `again` where the last start of its task here was not
    /// either.
    Unknown {
        attempt: AttemptId,
        again: bool,
    },
    /// It was accepted once, and is not held any more from where it is wanted.
    Gone {
        attempt: AttemptId,
    },
    /// Its link could not be taken up again. Its relay's stop is to come by [`ControlLane::cancel`].
    Lost {
        attempt: AttemptId,
        reason: Lost,
    },
    /// No `alive` has named it for ten seconds. Said once.
    Silent {
        attempt: AttemptId,
    },
    /// The link is up.
    Connected,
    /// It is not, and is dialled: one event for all that runs on it.
    Interrupted {
        reason: Interrupted,
    },
    /// Decision 0006: what loses nothing by it is to be placed elsewhere now.
    MoveQuiet,
    /// The boot that was dialled is over; nothing is known of the present one where a dial was refused.
    /// Said once.
    OtherBoot {
        boot_id: Option<BootId>,
    },
    /// Evidence against the node: orders do not reach it. Lifted by `OrdersArrive` only, which comes for
    /// an answered POST, and where nothing more is sent by this link.
    OrdersDoNotArrive,
    OrdersArrive,
    /// The node has answered a POST with this status.
    PostStatus {
        status: u16,
    },
    /// No connection to the node can be made for a POST.
    CannotConnect,
    /// The node leaves: it is not dialled until it registers again.
    Bye,
    /// Call `/health/live` of the node, and [`ControlLane::live_answered`] if it answers.
    ProbeLive,
    /// The node has no link: it is served without, until it registers again.
    NoLink,
    /// Ask the thread's gate for a turn; then [`ControlLane::may_resume`].
    WantResume,
    /// The turn is over.
    ResumeOver,
    /// Time has passed unseen: read all that has arrived, then call [`ControlLane::timer`].
    ReadSockets,
}

impl Action {
    /// The attempt that it is about, and whether nothing more comes of that.
    pub fn attempt(&self) -> Option<(AttemptId, bool)> {
        match self {
            Self::Sent { attempt }
            | Self::Accepted { attempt, .. }
            | Self::Restart { attempt, .. }
            | Self::Resumed { attempt }
            | Self::Head { attempt, .. }
            | Self::Frames { attempt, .. }
            | Self::TokenIds { attempt, .. }
            | Self::Error { attempt, .. }
            | Self::Silent { attempt } => Some((*attempt, false)),
            Self::Refused { attempt, .. }
            | Self::Ended { attempt, .. }
            | Self::NeverSent { attempt }
            | Self::Unknown { attempt, .. }
            | Self::Gone { attempt }
            | Self::Lost { attempt, .. } => Some((*attempt, true)),
            _ => None,
        }
    }
}

/// Why an attempt is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// Nothing could be reached in time.
    NotResumed,
    OtherBoot,
    /// The node has left.
    Left,
    /// The node brings nothing that can be used.
    Unusable,
    /// The lane was closed; what runs is not stopped by it.
    Closed,
}

impl Lost {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotResumed => "its link was not up in time",
            Self::OtherBoot => "the node has restarted",
            Self::Left => "the node has left",
            Self::Unusable => "its link brings nothing that can be used",
            Self::Closed => "its link is closed",
        }
    }
}

/// Why a link was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    Broken,
    Silent,
    BadRecord,
    /// The node does not know it any more.
    Stale,
    Credential,
}

impl Interrupted {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Broken => "its connection broke",
            Self::Silent => "nothing came on it",
            Self::BadRecord => "it brought something that cannot be read",
            Self::Stale => "the node does not know it any more",
            Self::Credential => "its credential does not count any more",
        }
    }
}

/// How a lane stands, for views and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneState {
    /// No hello has come since the node registered.
    Connecting,
    Up,
    Interrupted,
    /// The node has left, or has no link.
    None,
}

/// The control plane's end of one thread's link to one node.
#[derive(Debug)]
pub struct ControlLane {
    life: LifeId,
    lane: u16,
    boot_id: BootId,
    /// Another boot was found, and has not registered.
    boot_is_over: bool,
    /// Of the last GET, the last attempt's, the last POST's and the last start's: none is used twice.
    n: u64,
    number: u64,
    post: u64,
    place: u64,
    link: Link,
    dials: BTreeMap<u64, Dial>,
    /// When a dial began last.
    dialled_at: Moment,
    attempts: BTreeMap<AttemptId, Attempt>,
    numbers: BTreeMap<u64, AttemptId>,
    /// Starts that were not sent, by their places: those that go together, and those that go alone.
    queue: BTreeMap<u64, AttemptId>,
    large: BTreeMap<u64, AttemptId>,
    to_resume: BTreeSet<AttemptId>,
    /// Attempts of which the node is to be reminded that they wait for it, by the moment of their POST.
    waiting: BTreeSet<(Moment, AttemptId)>,
    /// Attempts that are accepted.
    running: usize,
    /// Those that are asked for again, by the moment since when they could be on this link.
    resuming: BTreeSet<(Moment, AttemptId)>,
    stops: Stops,
    done: VecDeque<AttemptId>,
    done_due: Option<Moment>,
    posts: BTreeMap<PostId, Post>,
    next_seen: Moment,
    control_after: Moment,
    starts_after: Moment,
    fresh_starts: bool,
    fresh_control: bool,
    /// Since when no POST was answered, and when one was last.
    undelivered: Option<Moment>,
    answered_at: Moment,
    suspected: bool,
    /// A hello has come since the node registered; since when none did; whether it answers else.
    greeted: bool,
    dialling_since: Moment,
    probe_at: Moment,
    lives: bool,
    replace_after: Moment,
    bad_links: u32,
    unknown_tasks: Aged<TaskId>,
    /// When it was asked that what has arrived be read.
    reading: Option<Moment>,
    dropped: u64,
    switched_off: Option<Rule>,
    actions: VecDeque<Action>,
}

impl ControlLane {
    /// A node has registered in this boot; it is dialled at once.
    pub fn new(now: Moment, life: LifeId, lane: u16, boot_id: BootId) -> Self {
        Self::new_after(now, life, lane, boot_id, 0)
    }

    /// The same where this life had the lane before: its last GET was `n` ([`ControlLane::last_n`]).
    pub fn new_after(now: Moment, life: LifeId, lane: u16, boot_id: BootId, n: u64) -> Self {
        let mut this = Self {
            life,
            lane,
            boot_id,
            boot_is_over: false,
            n,
            number: 0,
            post: 0,
            place: 0,
            link: Link::Interrupted(Interruption::new(now, now, now)),
            dials: BTreeMap::new(),
            dialled_at: now,
            attempts: BTreeMap::new(),
            numbers: BTreeMap::new(),
            queue: BTreeMap::new(),
            large: BTreeMap::new(),
            to_resume: BTreeSet::new(),
            waiting: BTreeSet::new(),
            running: 0,
            resuming: BTreeSet::new(),
            stops: Stops::new(),
            done: VecDeque::new(),
            done_due: None,
            posts: BTreeMap::new(),
            next_seen: now,
            control_after: now,
            starts_after: now,
            fresh_starts: false,
            fresh_control: false,
            undelivered: None,
            answered_at: now,
            suspected: false,
            greeted: false,
            dialling_since: now,
            probe_at: now + PROBE_EVERY,
            lives: false,
            replace_after: now,
            bad_links: 0,
            unknown_tasks: Aged::new(MAX_UNKNOWN_TASKS),
            reading: None,
            dropped: 0,
            switched_off: None,
            actions: VecDeque::new(),
        };
        this.dial(now);
        this
    }

    /// Only for the simulator: see [`Rule`].
    pub fn switch_off(&mut self, rule: Option<Rule>) {
        self.switched_off = rule;
    }

    fn enforces(&self, rule: Rule) -> bool {
        self.switched_off != Some(rule)
    }

    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The `n` of the last GET.
    pub fn last_n(&self) -> u64 {
        self.n
    }

    pub fn state(&self) -> LaneState {
        match &self.link {
            Link::Closed => LaneState::None,
            Link::Up(_) => LaneState::Up,
            Link::Interrupted(_) if self.greeted => LaneState::Interrupted,
            Link::Interrupted(_) => LaneState::Connecting,
        }
    }

    /// Records of attempts that nobody knows, so far.
    pub fn dropped_records(&self) -> u64 {
        self.dropped
    }

    /// How far the records of an attempt were handed out.
    pub fn taken(&self, attempt: &AttemptId) -> Option<u64> {
        self.attempts.get(attempt).map(|attempt| attempt.taken)
    }

    /// Attempts that are not over.
    pub fn attempts(&self) -> usize {
        self.attempts.len()
    }

    /// When [`ControlLane::timer`] is to be called. A token does not move it to an earlier moment.
    pub fn next_deadline(&self) -> Moment {
        if self.reading.is_some() {
            return Moment::ZERO;
        }
        let posts = self.posts.values().map(Post::deadline).min();
        let dials = self.dials.values().map(Dial::deadline).min();
        let own = match &self.link {
            Link::Closed => None,
            Link::Interrupted(interruption) => self.interruption_deadline(interruption),
            Link::Up(connection) => Some(self.connection_deadline(connection)),
        };
        posts.into_iter().chain(dials).chain(own).min().unwrap_or(Moment::NEVER)
    }

    /// The moment of [`ControlLane::next_deadline`] has come. Where it has long passed, or the link is to
    /// be silent, nothing is decided before what has arrived meanwhile was read.
    pub fn timer(&mut self, now: Moment) {
        let is_stalled = match self.reading.take() {
            // It may stand still once more before that was done.
            Some(asked) => now > asked + STALL,
            None => now > self.next_deadline() + STALL || self.is_silent(now),
        };
        if is_stalled && self.enforces(Rule::SocketsFirst) {
            self.reading = Some(now);
            self.actions.push_back(Action::ReadSockets);
            return;
        }
        self.expire_posts(now);
        self.expire_dials(now);
        match &self.link {
            Link::Closed => {}
            Link::Interrupted(_) => self.interrupted_timer(now),
            Link::Up(_) => self.connected_timer(now),
        }
        self.advance(now);
    }

    /// Sends what can be sent.
    fn advance(&mut self, now: Moment) {
        let Link::Up(_) = self.link else { return };
        self.post_control(now);
        self.post_starts(now);
        self.post_singles(now);
    }
}
