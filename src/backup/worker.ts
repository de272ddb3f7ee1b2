/** Entry of a worker thread: an engine that answers calls. Loaded by pool.ts. */
import { parentPort, workerData } from 'node:worker_threads'
import { Engine, type EngineSetup } from './engine.ts'
import { type Call, packError, type Reply } from './pool.ts'

const port = parentPort
if (!port) throw new Error('this file is the entry of a worker thread')

const engine = new Engine(workerData as EngineSetup, (pack) => {
  port.postMessage({ pack } satisfies Reply, [pack.ids.buffer as ArrayBuffer])
})

port.on('message', (call: Call) => {
  void answer(call)
})

async function answer(call: Call): Promise<void> {
  try {
    const value = await run(call)
    // A buffer that came with the call goes back with the answer.
    const transfer =
      typeof value === 'object' && value !== null && 'buffer' in value ? [value.buffer as ArrayBuffer] : []
    port!.postMessage({ call: call.call, value } satisfies Reply, transfer)
  } catch (error) {
    port!.postMessage({ call: call.call, error: packError(error) } satisfies Reply)
  }
}

function run(call: Call): Promise<unknown> {
  switch (call.method) {
    case 'hash':
      return engine.hash(call.argument)
    case 'store':
      return engine.store(call.argument)
    case 'flush':
      return engine.flush()
    case 'abort':
      return engine.abort()
    case 'decode':
      return engine.decode(call.argument)
    case 'verifyPack':
      return engine.verifyPack(call.argument)
    case 'close':
      return engine.close()
  }
}
