//! The common configuration structure (specification §4.1.4.3) as bytes.

use super::queue::QueueState;

/// Length in bytes, with the two fields added by version 1.2.
pub(super) const LEN: usize = 0x3C;

pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: usize = 0x04;
pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub(super) const DRIVER_FEATURE: u64 = 0x0C;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
pub(super) const DEVICE_STATUS: u64 = 0x14;
pub(super) const QUEUE_SELECT: u64 = 0x16;
pub(super) const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: usize = 0x1A;
pub(super) const QUEUE_ENABLE: u64 = 0x1C;
const QUEUE_NOTIFY_OFFSET: usize = 0x1E;
pub(super) const QUEUE_DESCRIPTORS: u64 = 0x20;
pub(super) const QUEUE_AVAILABLE: u64 = 0x28;
pub(super) const QUEUE_USED: u64 = 0x30;
/// The end of the three queue addresses.
pub(super) const QUEUE_END: u64 = 0x38;

/// There are no vectors to choose from.
const NO_VECTOR: u16 = 0xFFFF;

/// The values the structure shows.
#[derive(Debug)]
pub(super) struct CommonConfig {
    pub(super) device_feature_select: u32,
    pub(super) device_features: u64,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) num_queues: u16,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    /// The selected queue, if there is one.
    pub(super) queue: Option<QueueState>,
}

/// Word `select` of a feature set; there are no features beyond the second.
fn feature_word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl CommonConfig {
    pub(super) fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        let device = feature_word(self.device_features, self.device_feature_select);
        let driver = feature_word(self.driver_features, self.driver_feature_select);
        put(DEVICE_FEATURE_SELECT as usize, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &device.to_le_bytes());
        put(DRIVER_FEATURE_SELECT as usize, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE as usize, &driver.to_le_bytes());
        put(CONFIG_VECTOR, &NO_VECTOR.to_le_bytes());
        put(NUM_QUEUES, &self.num_queues.to_le_bytes());
        put(DEVICE_STATUS as usize, &[self.status]);
        put(QUEUE_SELECT as usize, &self.queue_select.to_le_bytes());
        put(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(queue) = &self.queue {
            put(QUEUE_SIZE as usize, &queue.size.to_le_bytes());
            put(QUEUE_ENABLE as usize, &u16::from(queue.ready).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS as usize, &queue.descriptors.to_le_bytes());
            put(QUEUE_AVAILABLE as usize, &queue.available.to_le_bytes());
            put(QUEUE_USED as usize, &queue.used.to_le_bytes());
        }
        bytes
    }
}
