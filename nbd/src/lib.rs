//! Network block devices: the NBD protocol in its fixed newstyle form, as "The NBD protocol" of the
//! NetworkBlockDevice project's `doc/proto.md` has it.
//!
//! [`server`] serves exports to any client of the protocol; [`Client`] uses an export of any server.
//! Between the two there is one private option ([`wire::OPTION_VMFT`]) that carries calls of whoever
//! uses them; a server or a client that does not know it is not disturbed.

#![forbid(unsafe_code)]

mod client;
mod connection;
mod control;
mod replies;
pub mod server;
pub mod wire;

pub use client::{Client, ClientError, Event, Request};
pub use connection::{ByteStream, Connect, Export, NegotiationError};
pub use control::{CallError, Control};
pub use tokio_rustls::rustls;
