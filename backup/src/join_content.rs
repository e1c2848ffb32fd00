//! What a backup joins with, beside pages.

use serde::{Deserialize, Serialize};
use vmft_log::checkpoint::CompleteCheckpoint;
use vmft_log::entry::OutputSequence;
use vmft_log::wire::MAX_COUNT;
use vmft_vmm::machine::StateError;
use vmft_vmm::outputs::{Output, are_a_guests};

/// The state part of the checkpoint that a backup joins with.
///
/// Outputs that were made before and are not known to be out, the backup cannot make by itself, and its
/// primary may be lost before anybody outside has taken them. So they come with the checkpoint, and the
/// primary need not wait for the outside before it takes a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JoinContent {
    /// The machine, encoded, without its memory and what it boots from.
    pub(crate) machine: Vec<u8>,
    /// Console outputs and packets, in order.
    pub(crate) outputs: Vec<Output>,
}

impl JoinContent {
    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain state always encodes")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, postcard::Error> {
        match postcard::take_from_bytes(bytes) {
            Ok((content, [])) => Ok(content),
            Ok(_) => Err(postcard::Error::DeserializeBadEncoding),
            Err(error) => Err(error),
        }
    }

    /// Takes the outputs out of a checkpoint that a backup has joined with, which is the machine's
    /// alone from then on.
    ///
    /// # Errors
    /// [`StateError::Encoding`], or [`StateError::OtherMachine`] for outputs that no guest has put out.
    pub(crate) fn unpack(checkpoint: &mut CompleteCheckpoint) -> Result<Vec<Output>, StateError> {
        let content = Self::decode(&checkpoint.state).map_err(StateError::Encoding)?;
        if !are_a_guests(&content.outputs, OutputSequence(MAX_COUNT)) {
            return Err(StateError::OtherMachine);
        }
        checkpoint.state = content.machine;
        Ok(content.outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_vmm::outputs::OutputKind;

    #[test]
    fn what_is_not_out_comes_with_the_machine_and_nothing_may_follow_it() {
        let kind = OutputKind::Console { offset: 70, bytes: b"not seen yet".to_vec() };
        let outputs = vec![Output { sequence: OutputSequence(9), kind }];
        let content = JoinContent { machine: vec![1, 2, 3], outputs };
        let mut bytes = content.encode();
        assert_eq!(JoinContent::decode(&bytes), Ok(content));
        bytes.push(0);
        assert!(JoinContent::decode(&bytes).is_err());
    }
}
