-- The right to generate: given to a session's first viewer, or to whoever finds the lease of a running one lapsed.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 deadlines zset
-- ARGV  1 id, 2 worker, 3 nonce of this call, 4 lease in ms, 5 seconds to keep what is owed, 6 '1' to recover a lapsed lease
-- gives {'missing'} | {'ended', state, ending id, '1' if the log is still there} | {'running', worker}
--       | {'claimed', epoch, request, '1' if the model may be (re-)run}
-- Atomic: two viewers must not start two generations, and `<epoch>-0` in the log is what refuses an earlier epoch's late
-- writes, so it stands there before anybody holds the new epoch. Idempotent by nonce.
local s = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'nonce', 'start', 'worker', 'ending_id')
local state, epoch = s[1], tonumber(s[2])
if not state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  return { 'missing' }
end
if ENDED[state] then
  return { 'ended', state, s[6], tostring(redis.call('EXISTS', KEYS[2])) }
end
local now = now_ms()
if state == 'running' and s[3] ~= ARGV[3] then
  local deadline = redis.call('ZSCORE', KEYS[4], ARGV[1])
  if ARGV[6] ~= '1' or (deadline and tonumber(deadline) > now) then
    return { 'running', s[5] }
  end
end
local rerun = '1'
if s[3] ~= ARGV[3] then
  -- An epoch that said anything is never run again: a viewer has seen it. One that only started has been seen by nobody.
  if epoch > 1 or redis.call('XLEN', KEYS[2]) > 1 then
    rerun = '0'
  end
  epoch = epoch + 1
  redis.call('XADD', KEYS[2], epoch .. '-0', 'start', s[4])
  redis.call('HSET', KEYS[1], 'state', 'running', 'epoch', epoch, 'worker', ARGV[2], 'nonce', ARGV[3], 'rerun', rerun)
  if rerun == '1' then
    redis.call('HSET', KEYS[1], 'started_at', now)
  end
else
  rerun = redis.call('HGET', KEYS[1], 'rerun')
end
redis.call('ZADD', KEYS[4], now + ARGV[4], ARGV[1])
for i = 1, 3 do
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
return { 'claimed', epoch, redis.call('HGET', KEYS[3], 'request'), rerun }
