//! [`Control`]: the way to the control loop, for everybody but the loop itself.
//!
//! What happened is sent as an event; a decision is asked for by a call, which gives what it is
//! about and nothing else; what only the core can answer, and what changes nothing, is a question.
//! Both mailboxes are bounded. Who reads them is `services/placement.rs`.

use std::collections::VecDeque;
use std::sync::Arc;

use daemon_kit::Clock;
use daemon_kit::byte_budget::HeldBytes;
use owned_tasks::StreamThread;
use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, IntentAnswer, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::placement::Explanation;
use pool_registry_types::task::TaskAccepted;
use pool_registry_types::{Epoch, ErrorBody, ErrorCode, HolderId, NodeId, SessionKey, TaskId};
use task_scheduler::{Answer, Event, Registrar, ReplyTo};
use task_stream::{Payload, TaskSpec};
use tokio::sync::{mpsc, oneshot};

use crate::services::followers::{Change, Changes, Follower};
use crate::services::published::Published;

/// Messages that wait for the loop; a full mailbox answers `OVERLOADED`. One message takes some
/// microseconds, so this is a wait of some ten milliseconds.
const MAILBOX: usize = 8192;
/// Questions that wait for the loop; one may take a millisecond in a large cluster.
const QUESTIONS: usize = 64;

/// The core's answer to a call, on its way to whoever made it.
pub(super) type Reply = oneshot::Sender<Result<Answer, ErrorBody>>;

pub(super) enum Message {
    Event(Event),
    Call { event: Box<dyn FnOnce(ReplyTo) -> Event + Send>, reply: Reply },
    Submit { spec: Box<TaskSpec>, payload: Payload, held: HeldBytes, thread: StreamThread, reply: Reply },
}

pub(super) enum Question {
    Explain(TaskId, oneshot::Sender<Result<Explanation, ErrorBody>>),
    ExplainRequest(Box<TaskSpec>, oneshot::Sender<Explanation>),
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

impl std::fmt::Debug for Question {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Question")
    }
}

/// The loop's end of the mailboxes.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(super) messages: mpsc::Receiver<Message>,
    pub(super) questions: mpsc::Receiver<Question>,
}

/// The mailboxes, made before the loop because others need them first.
pub(crate) fn mailbox(clock: Clock) -> (Control, Inbox) {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (ask, questions) = mpsc::channel(QUESTIONS);
    let changes = Changes::default();
    let published = Arc::new(Published::new(clock));
    (Control { mailbox, questions: ask, changes, published }, Inbox { messages, questions })
}

/// The way to the control loop. Clones are cheap.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    mailbox: mpsc::Sender<Message>,
    questions: mpsc::Sender<Question>,
    changes: Changes,
    /// What readers are answered from, without the loop.
    pub(crate) published: Arc<Published>,
}

impl Control {
    /// Says what happened. Waits for room, because it must not be lost.
    pub(crate) async fn send(&self, event: Event) {
        // The loop ends last; without it nobody needs to know.
        let _ = self.mailbox.send(Message::Event(event)).await;
    }

    /// Says the first of these, once there is room; waits for ever where there is none to say. Dropped
    /// before, it has taken nothing.
    pub(crate) async fn send_first(&self, events: &mut VecDeque<Event>) {
        if events.is_empty() {
            return std::future::pending().await;
        }
        match self.mailbox.reserve().await {
            Ok(room) => {
                if let Some(event) = events.pop_front() {
                    room.send(Message::Event(event));
                }
            }
            // The loop has ended.
            Err(_) => events.clear(),
        }
    }

    // ---- calls: errors are the decision's own, `OVERLOADED`, and `DRAINING` where the loop has ended ----

    /// `registrar`: whose place the node takes, where those are bounded.
    pub(crate) async fn register(
        &self,
        request: RegisterRequest,
        registrar: Option<Registrar>,
    ) -> Result<RegisterAnswer, ErrorBody> {
        match self.call(|reply| Event::Register { reply, request, registrar }).await? {
            Answer::Registered(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn heartbeat(
        &self,
        node_id: NodeId,
        beat: Heartbeat,
    ) -> Result<HeartbeatAnswer, ErrorBody> {
        match self.call(|reply| Event::Heartbeat { reply, node_id, beat }).await? {
            Answer::Heartbeat(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn deregister(&self, node_id: NodeId, epoch: Option<Epoch>) -> Result<(), ErrorBody> {
        match self.call(|reply| Event::Deregister { reply, node_id, epoch }).await? {
            Answer::Deregistered => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// An operator's order for a node.
    pub(crate) async fn want(&self, node_id: NodeId, intent: Intent) -> Result<IntentAnswer, ErrorBody> {
        match self.call(move |reply| Event::Want { reply, node_id, intent }).await? {
            Answer::Intent(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    /// Submits a task. The payload is kept, and counted, with the task's log, if it gets one, and its
    /// stream lives on the thread.
    pub(crate) async fn submit(
        &self,
        spec: TaskSpec,
        payload: Payload,
        held: HeldBytes,
        thread: StreamThread,
    ) -> Result<TaskAccepted, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Submit { spec: Box::new(spec), payload, held, thread, reply };
        match self.answered(message, answer).await? {
            Answer::Submitted(accepted) => Ok(accepted),
            other => Err(unexpected(&other)),
        }
    }

    /// By the task's key. Nothing but a terminal `CANCELED` follows in the task's log once this has returned well.
    pub(crate) async fn cancel(&self, task_id: TaskId) -> Result<(), ErrorBody> {
        match self.call(move |reply| Event::Cancel { reply, task_id }).await? {
            Answer::Canceled => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn delete_session(&self, session: SessionKey) -> Result<(), ErrorBody> {
        match self.call(move |reply| Event::DeleteSession { reply, session }).await? {
            Answer::SessionDeleted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    // ---- questions ----

    /// By the task's key.
    pub(crate) async fn explain(&self, id: TaskId) -> Result<Explanation, ErrorBody> {
        self.ask(|reply| Question::Explain(id, reply)).await?
    }

    pub(crate) async fn explain_request(&self, spec: TaskSpec) -> Result<Explanation, ErrorBody> {
        self.ask(|reply| Question::ExplainRequest(Box::new(spec), reply)).await
    }

    // ---- followers ----

    /// What changes in the cluster from now on; of tasks this holder's only, where one is given.
    pub(crate) fn follow(&self, only: Option<HolderId>) -> Follower {
        self.changes.follow(only)
    }

    /// For those who follow.
    pub(super) fn publish(&self, change: Change) {
        self.changes.publish(change);
    }

    async fn call(&self, event: impl FnOnce(ReplyTo) -> Event + Send + 'static) -> Result<Answer, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        self.answered(Message::Call { event: Box::new(event), reply }, answer).await
    }

    async fn answered(
        &self,
        message: Message,
        answer: oneshot::Receiver<Result<Answer, ErrorBody>>,
    ) -> Result<Answer, ErrorBody> {
        post(&self.mailbox, message)?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        post(&self.questions, question(reply))?;
        answer.await.map_err(|_| gone())
    }
}

fn post<T>(mailbox: &mpsc::Sender<T>, message: T) -> Result<(), ErrorBody> {
    mailbox.try_send(message).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => {
            let message = "the control loop has more to do than it can hold";
            ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(100)
        }
        mpsc::error::TrySendError::Closed(_) => gone(),
    })
}

fn gone() -> ErrorBody {
    ErrorBody::new(ErrorCode::Draining, "the control plane is shutting down")
}

/// The core answered something else than what was asked: a defect.
fn unexpected(answer: &Answer) -> ErrorBody {
    tracing::error!(?answer, "not the answer that was asked for");
    ErrorBody::new(ErrorCode::Internal, "a defect in the server, see its log")
}
