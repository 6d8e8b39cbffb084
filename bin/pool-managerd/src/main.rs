//! `pool-managerd`: the node daemon. Reads its configuration whole, then hands over.

mod api;
mod bootstrap;
mod config;
mod link;
mod logs;
mod metrics;
mod models;
mod pools;
mod progress;
mod slotless;
mod state;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config = match daemon_kit::settings::read::<config::Settings>() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let logs = daemon_kit::telemetry::init(config.shared.log_format, &config.shared.log);
    daemon_kit::serve::block_on(logs, bootstrap::run(config))
}
