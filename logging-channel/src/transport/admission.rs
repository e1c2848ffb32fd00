//! What else a backup must show before it is taken.

use super::clock;
use crate::fingerprint::Identity;
use crate::handshake::Refusal;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

type Look = dyn Fn(&Identity) -> Result<(), Refusal> + Send + Sync;

/// Looks at a backup whose identity fits, on a thread that may wait for the host's storage.
#[derive(Clone)]
pub struct AdmissionCheck(Arc<Look>);

impl fmt::Debug for AdmissionCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdmissionCheck")
    }
}

impl AdmissionCheck {
    /// The check that `look` makes.
    pub fn new(look: impl Fn(&Identity) -> Result<(), Refusal> + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// Makes it, for at most `limit`: what cannot be found out in time can be asked again.
    pub(super) async fn make(&self, peer: Identity, limit: Duration) -> Result<(), Refusal> {
        let look = Arc::clone(&self.0);
        let looking = tokio::task::spawn_blocking(move || look(&peer));
        match clock::within(limit, looking).await {
            Some(Ok(found)) => found,
            Some(Err(_)) | None => {
                Err(Refusal::NotAccepting("its storage does not answer in time".into()))
            }
        }
    }
}
