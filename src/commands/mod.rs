//! One module a command.

pub mod backup;
pub mod console;
pub mod control;
pub mod dashboard;
pub mod demo;
pub mod disk;
pub mod doctor;
pub mod explain;
pub mod fault;
pub mod guest;
pub mod image;
pub mod keys;
pub mod primary;
pub mod record;
pub mod replay;
pub mod run;
pub mod shell;
pub mod up;
