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
    port!.postMessage({ call: call.call, error: packError(error) } satisfies Reply, [])
  }
}

async function run(call: Call): Promise<unknown> {
  switch (call.method) {
    case 'hash':
      return await engine.hash(call.argument)
    case 'store':
      return await engine.store(call.argument)
    case 'flush':
      return await engine.flush()
    case 'abort':
      return await engine.abort()
    case 'decode':
      return await engine.decode(call.argument)
    case 'verifyPack':
      return await engine.verifyPack(call.argument)
    case 'close':
      return await engine.close()
    default:
      throw new Error(`no method ${(call as Call).method}`)
  }
}
