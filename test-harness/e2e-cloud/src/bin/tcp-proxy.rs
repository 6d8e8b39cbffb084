//! A proxy between the daemons that can be stopped: `tcp-proxy LISTEN=TARGET…`.
//!
//! While it is stopped the system goes on taking connections for it, and nothing comes of them.

use std::process::ExitCode;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut ways = JoinSet::new();
    for way in std::env::args().skip(1) {
        let Some((listen, target)) = way.split_once('=').map(|(l, t)| (l.to_owned(), t.to_owned())) else {
            eprintln!("tcp-proxy: {way} is not LISTEN=TARGET");
            return ExitCode::FAILURE;
        };
        match TcpListener::bind(&listen).await {
            Ok(listener) => ways.spawn(serve(listener, target)),
            Err(error) => {
                eprintln!("tcp-proxy: {listen}: {error}");
                return ExitCode::FAILURE;
            }
        };
    }
    while ways.join_next().await.is_some() {}
    ExitCode::SUCCESS
}

async fn serve(listener: TcpListener, target: String) {
    let mut connections = JoinSet::new();
    while let Ok((mut client, _)) = listener.accept().await {
        let target = target.clone();
        connections.spawn(async move {
            // A connection that nobody takes ends as one that breaks.
            let Ok(mut server) = TcpStream::connect(target).await else { return };
            // It works without it, only slower.
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let _ = copy_bidirectional(&mut client, &mut server).await;
        });
        while connections.try_join_next().is_some() {}
    }
}
