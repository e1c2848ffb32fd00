//! The `vmft` command line, as a library so that tests and experiments start what users start.

pub mod api;
pub mod api_client;
pub mod commands;
pub mod disk_boot;
pub mod disk_images;
pub mod disk_server;
pub mod examples;
pub mod host_choice;
pub mod image_import;
mod interrupt;
pub mod machine_options;
mod nbd_disk;
pub mod net_options;
pub mod options;
pub mod pair;
pub mod pair_options;
pub mod private_network;
pub mod process;
pub mod progress;
pub mod remedy;
pub mod sandbox_options;
pub mod seed;
pub mod terminal;
