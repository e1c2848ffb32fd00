//! `vmft image`.

use crate::image_import::import;
use crate::terminal::say;
use anyhow::Result;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `vmft image`.
#[derive(Debug, Args)]
pub struct ImageOptions {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Make a raw disk of an image as it is shipped
    #[command(after_help = crate::examples::IMAGE_IMPORT)]
    Import(ImportOptions),
}

/// Options of `vmft image import`.
#[derive(Debug, Args)]
struct ImportOptions {
    /// The image: raw, or packed with gzip, xz or zstd; qcow2, vmdk, vhdx and others by qemu-img
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The raw disk to make; it must not exist
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// Works on disk images.
pub fn image(options: &ImageOptions) -> Result<ExitCode> {
    let ImageCommand::Import(options) = &options.command;
    let size = import(&options.image, &options.disk, &mut crate::progress::terminal())?;
    say(&format!("disk  {}  {size} bytes", options.disk.display()))?;
    Ok(ExitCode::SUCCESS)
}
