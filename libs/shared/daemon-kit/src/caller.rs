//! Who makes a request, as the gate has found: for handlers that care, and for what one token may
//! have at once.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use pool_registry_types::{ErrorCode, HolderId, NodeId};

use crate::answer::ApiError;
use crate::connections::Peer;
use crate::tokens::{Holder, Scope};

/// Who makes a request, for handlers that care.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Absent where no tokens are configured.
    pub holder: Option<Arc<Holder>>,
    pub peer: Option<Arc<Peer>>,
    /// Nodes must show a certificate of their name.
    pub(crate) nodes_show_certificates: bool,
}

impl Caller {
    /// Whose its tasks, sessions and artifacts are. All who call without a token are one holder.
    pub fn holder_id(&self) -> HolderId {
        self.holder.as_ref().map_or(HolderId::OPEN, |holder| holder.id)
    }

    /// Whether it may look at everybody's things, their contents left out, and cancel everybody's tasks.
    pub fn sees_all(&self) -> bool {
        self.holder.as_ref().is_none_or(|holder| holder.has(Scope::Operator))
    }

    /// Whether it may do everything.
    pub fn is_admin(&self) -> bool {
        self.holder.as_ref().is_none_or(|holder| holder.has(Scope::Admin))
    }

    /// # Errors
    /// `FORBIDDEN` when the token is bound to another node, or the certificate is for another name.
    pub fn authorize_node(&self, node_id: &NodeId) -> Result<(), ApiError> {
        let forbidden = |message: String| {
            tracing::warn!(%node_id, reason = message, "the caller is not authorized for this node");
            Err(ApiError::new(ErrorCode::Forbidden, message))
        };
        if let Some(bound) = self.holder.as_ref().and_then(|holder| holder.node_id.as_ref())
            && bound != node_id
        {
            return forbidden(format!("this token is bound to the node {bound}"));
        }
        if !self.nodes_show_certificates {
            return Ok(());
        }
        match self.peer.as_ref().and_then(|peer| peer.certificate.as_ref()) {
            None => forbidden("a node must show its TLS certificate here".into()),
            Some(certificate) if certificate.is_for(node_id.as_str()) => Ok(()),
            Some(certificate) => forbidden(format!(
                "this certificate is for {}, not for {node_id}",
                certificate.names.join(", ")
            )),
        }
    }

    /// An operator may, whatever certificate is shown; a node only itself.
    ///
    /// # Errors
    /// As [`Self::authorize_node`].
    pub fn may_send_away(&self, node_id: &NodeId) -> Result<(), ApiError> {
        match &self.holder {
            Some(holder) if !holder.has(Scope::Admin) => self.authorize_node(node_id),
            _ => Ok(()),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}
